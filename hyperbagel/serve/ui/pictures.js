// A slot for a picture that is being made: progress and previews, then the picture, what it took, and buttons for it.

import { brokeOff, events } from "./api.js";
import { fromBase64 } from "./png.js";
import { make, ms } from "./page.js";

export const TINY = 200;  // pixels: pictures up to this width are enlarged with hard edges instead of blurred
export const STREAM = { stream: true, partial_images: 3, progress: true };  // fields of a request that `drawInto` follows

/** An <img> that shows a blob, which it keeps as `blob`. */
export function imageOf(blob, alt) {
  const image = make("img", { alt, blob, src: URL.createObjectURL(blob) });
  image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= TINY), { once: true });
  return image;
}

/** Frees the memory of the pictures inside an element, before they are removed. */
export function letGo(place) {
  for (const image of place.querySelectorAll("img")) URL.revokeObjectURL(image.src);
}

export function download(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** "prefill 3 ms · denoise 288 ms · decode 6 ms" */
export const stages = (timings) => Object.entries(timings).map(([name, seconds]) => `${name} ${ms(seconds)}`).join(" · ");

/** Two pictures on top of each other, with a slider that moves the line between them. */
function sides(before, after, alt) {
  const range = make("input", { type: "range", min: 0, max: 100, value: 50, ariaLabel: "Before and after" });
  const place = make("div", { className: "sides" }, imageOf(after, alt), imageOf(before, "before"), make("div", { className: "line" }));
  place.append(make("span", { className: "tag", textContent: "before" }), make("span", { className: "tag", textContent: "after" }));
  const move = () => place.style.setProperty("--at", `${range.value}%`);
  range.addEventListener("input", move);
  move();
  return make("div", {}, place, range);
}

export class Slot {
  /** actions: {label: (blob) => ...}, buttons below the finished picture. before: a Blob to compare with. */
  constructor({ alt, actions = {}, before = null, title = "" }) {
    Object.assign(this, { alt, actions, before, title, began: performance.now() });
    this.bar = make("progress", { max: 1, ariaLabel: "Progress" });
    this.view = make("div", { className: "empty", textContent: "waiting …" });
    this.caption = make("figcaption");
    this.element = make("figure", { className: "slot" }, ...(title ? [make("p", { className: "who", textContent: title })] : []), this.view, this.bar, this.caption);
    this.element.dataset.state = "waiting";
  }

  show(view) {
    for (const image of this.view.querySelectorAll?.("img") ?? []) URL.revokeObjectURL(image.src);
    if (this.view.tagName === "IMG") URL.revokeObjectURL(this.view.src);
    this.view.replaceWith(view);
    this.view = view;
  }

  progress(step, steps) {
    this.element.dataset.state = "drawing";
    Object.assign(this.bar, { value: step, max: steps });
    this.caption.textContent = `step ${step} of ${steps}`;
    if (this.view.className === "empty") this.view.textContent = "drawing …";
  }

  preview(blob) {
    this.element.dataset.previews = Number(this.element.dataset.previews ?? 0) + 1;
    this.show(imageOf(blob, `${this.alt}, unfinished`));
  }

  /** Shows the finished picture. item: an entry of the API's answer. */
  done(item, seed) {
    const took = (performance.now() - this.began) / 1000;
    this.blob = fromBase64(item.b64_json);
    this.item = item;
    this.element.dataset.state = "done";
    this.element.dataset.seed = seed;
    this.show(this.before ? sides(this.before, this.blob, this.alt) : imageOf(this.blob, this.alt));
    this.bar.remove();
    const facts = make("p", { className: "timings", textContent: `seed ${seed} · ${item.nfe} NFE · ${stages(item.timings)} · round trip ${ms(took)}` });
    const buttons = make("div", { className: "bar small" });
    for (const [label, action] of Object.entries({ ...this.actions, Download: (blob) => download(blob, `hyperbagel-${seed}.png`) })) {
      const button = make("button", { type: "button", textContent: label });
      button.addEventListener("click", () => action(this.blob));
      buttons.append(button);
    }
    const plan = item.revised_prompt ? [make("details", {}, make("summary", { textContent: "Its plan" }), make("p", { textContent: item.revised_prompt }))] : [];
    const asked = this.title ? [] : [make("p", { className: "asked", textContent: this.alt, title: this.alt })];
    this.caption.replaceChildren(...asked, facts, ...plan, buttons);
  }

  /** Ends the slot without a picture, unless it has one. */
  end(state, text) {
    if (this.element.dataset.state === "done") return;
    this.element.dataset.state = state;
    this.bar.remove();
    if (this.view.className === "empty") this.view.textContent = text;
    this.caption.textContent = text;
  }
}

/** Puts new slots above the older ones and scrolls them into view. */
export function place(slots, results) {
  results.querySelector(".hint")?.remove();
  results.prepend(...slots.map((slot) => slot.element));
  slots[0].element.scrollIntoView({ block: "nearest" });
}

/** Requests pictures as a stream and shows each in its slot, in the order of the seeds. Resolves to a message that they are done; if
 *  anything goes wrong, ends the slots that are left and throws. */
export async function drawInto(slots, path, options, seed, signal) {
  const name = (index) => String(BigInt(seed) + BigInt(index));
  try {
    for await (const event of events(path, { ...options, signal })) {
      const slot = slots[event.index ?? 0];
      const kind = event.type.split(".")[1];
      if (kind === "progress") slot.progress(event.step, event.steps);
      else if (kind === "partial_image") slot.preview(fromBase64(event.b64_json));
      else if (kind === "completed") slot.done(event, name(event.index ?? 0));
    }
    if (slots.some((slot) => slot.element.dataset.state !== "done")) throw brokeOff();
    return slots.length > 1 ? `${slots.length} pictures are done, seeds from ${seed}.` : `The picture is done, seed ${seed}.`;
  } catch (error) {
    const cancelled = error.name === "AbortError";
    for (const slot of slots) slot.end(cancelled ? "cancelled" : "failed", cancelled ? "cancelled" : "failed");
    throw error;
  }
}
