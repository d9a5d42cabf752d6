// The Edit tab: source pictures, a mask over the first, an instruction. A result can become the next source.

import { ApiError } from "./api.js";
import { Pictures } from "./files.js";
import { Mask } from "./mask.js";
import { runner } from "./page.js";
import { drawInto, place, Slot, STREAM } from "./pictures.js";
import { Settings } from "./settings.js";

const UNDOS = 30;

export function setUpEdit(panel, card, { editThis, restoreFrom }) {
  const settings = new Settings(panel.querySelector("[data-settings]"), card, "edit");
  const results = panel.querySelector("[data-results]");
  const prompt = panel.querySelector("[name=prompt]");
  const undo = panel.querySelector("[data-undo]");
  undo.disabled = true;  // set here as well: Firefox restores a button's state after a reload
  const history = [];  // {list, paint} before each change of the pictures or the mask

  const remember = () => {
    history.push({ list: pictures.list, paint: mask.snapshot() });
    if (history.length > UNDOS) history.shift();
    undo.disabled = false;
  };
  const mask = new Mask(panel.querySelector("[data-mask]"), { before: remember });
  const shown = { blob: null, ready: Promise.resolve() };  // the picture under the mask; `ready` once it is loaded
  const follow = (list) => {
    if (shown.blob === (list[0] ?? null)) return;
    shown.blob = list[0] ?? null;
    shown.ready = shown.ready.then(() => mask.load(shown.blob));
  };
  const pictures = new Pictures(panel, { most: card.limits.images, before: remember, changed: follow });

  undo.addEventListener("click", async () => {
    const back = history.pop();
    undo.disabled = history.length === 0;
    pictures.set(back.list, { quiet: true });
    await shown.ready;
    mask.restore(back.paint);
  });

  runner(panel, async (signal) => {
    if (!pictures.list.length) throw new ApiError("Add the picture that is to be edited first.");
    await shown.ready;
    const { n, ...body } = settings.read();
    const [before] = pictures.list.slice(-1);
    const paint = await mask.file();
    const form = new FormData();
    for (const blob of pictures.list) form.append("image[]", blob, "picture");
    if (paint) form.append("mask", paint, "mask.png");
    for (const [name, value] of Object.entries({ prompt: prompt.value, n, ...body, ...STREAM })) form.append(name, value);
    const slot = () => new Slot({ alt: prompt.value, before: paint ? pictures.list[0] : before, actions: { "Use as input": editThis, "Restore settings": restoreFrom } });
    const slots = Array.from({ length: n }, slot);
    place(slots, results);
    return drawInto(slots, "v1/images/edits", { method: "POST", body: form }, body.seed, signal);
  });

  return {
    /** Replaces the source pictures by one. */
    use(blob) { pictures.set([blob]); },
    restore(found) {
      prompt.value = found.prompt ?? "";
      const remarks = settings.restore(found);
      const missing = (found.pictures ?? 1) - pictures.list.length;
      if (missing > 0) remarks.push(`add the ${found.pictures > 1 ? `${found.pictures} pictures` : "picture"} it was made from`);
      if (found.masked && mask.empty) remarks.push("paint its mask again");
      return remarks;
    },
  };
}
