// The Compare tab: the model itself (the teacher) and its students draw the same prompt from the same noise, one after another.

import { jsonBody } from "./api.js";
import { make, runner, showRanges } from "./page.js";
import { drawInto, letGo, Slot, STREAM } from "./pictures.js";
import { KNOWN, Seed } from "./settings.js";

export function setUpCompare(panel, card, { editThis }) {
  const columns = panel.querySelector("[data-columns]");
  const field = (name) => panel.querySelector(`[name=${name}]`);
  const seed = new Seed(panel.querySelector("[data-seed]"));
  const others = card.students.filter((name) => !KNOWN.some(([known]) => known === name)).map((name) => [name, `${card.samplers[name].nfe} evaluations`]);
  // [name for the API, title, whether it is installed]
  const rows = [["none", "Teacher", true], ...[...KNOWN, ...others].map(([name, text]) => [name, `Student ${name}: ${text}`, card.students.includes(name)])];
  showRanges(panel);

  const empty = ([name, title, there]) => {
    const text = there ? "–" : "Not installed: the model folder has no students/" + name;
    const slot = make("figure", { className: there ? "slot" : "slot off" }, make("p", { className: "who", textContent: title }), make("div", { className: "empty", textContent: text }));
    Object.assign(slot.dataset, { who: name, state: there ? "idle" : "unavailable" });
    return slot;
  };
  columns.replaceChildren(...rows.map(empty));

  runner(panel, async (signal) => {
    const value = seed.take();
    const slots = rows.map((row) => {
      const [name, title, there] = row;
      if (!there) return { element: empty(row) };
      const slot = new Slot({ alt: `${title}: ${field("prompt").value}`, title, actions: { "Edit this": editThis } });
      slot.element.dataset.who = name;
      return slot;
    });
    letGo(columns);
    columns.replaceChildren(...slots.map((slot) => slot.element));
    columns.scrollIntoView({ block: "nearest" });
    let teacher = null;
    for (const [i, [name, , there]] of rows.entries()) {
      if (!there) continue;
      const slot = slots[i];
      slot.began = performance.now();
      const body = { prompt: field("prompt").value, seed: value, text_scale: Number(field("text_scale").value), student: name, ...STREAM };
      if (name === "none") body.interval = [0, 1];  // as the paper counts: both guidance branches at each of the 50 steps
      try {
        await drawInto([slot], "v1/images/generations", jsonBody(body), value, signal);
      } catch (error) {
        const text = error.name === "AbortError" ? "cancelled" : "not drawn";
        for (const rest of slots.slice(i + 1)) rest.end?.("cancelled", text);
        throw error;
      }
      const { prefill, denoise } = slot.item.timings;
      const spent = prefill + denoise;  // together, because a student reads the text within its first evaluation
      teacher ??= name === "none" ? spent : null;
      if (teacher && name !== "none") slot.caption.prepend(make("p", { className: "speed", textContent: `read and denoised ${(teacher / spent).toFixed(1)} times as fast as the teacher` }));
    }
    return `All are drawn, seed ${value}.`;
  });
}
