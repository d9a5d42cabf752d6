// The Draw tab: a prompt and settings, and the pictures drawn so far.

import { jsonBody } from "./api.js";
import { runner } from "./page.js";
import { drawInto, place, Slot, STREAM } from "./pictures.js";
import { Settings } from "./settings.js";

export function setUpDraw(panel, card, { editThis, restoreFrom }) {
  const settings = new Settings(panel.querySelector("[data-settings]"), card, "draw");
  const results = panel.querySelector("[data-results]");
  const prompt = panel.querySelector("[name=prompt]");
  runner(panel, async (signal) => {
    const { n, ...body } = settings.read();
    const slots = Array.from({ length: n }, () => new Slot({ alt: prompt.value, actions: { "Edit this": editThis, "Restore settings": restoreFrom } }));
    place(slots, results);
    const request = { prompt: prompt.value, n, ...body, ...STREAM };
    return drawInto(slots, "v1/images/generations", jsonBody(request), body.seed, signal);
  });
  return {
    restore(found) {
      prompt.value = found.prompt ?? "";
      return settings.restore(found);
    },
  };
}
