// A list of pictures that the user chooses, drops or pastes, with thumbnails.

import { ApiError } from "./api.js";
import { make, note, showError } from "./page.js";
import { imageOf, letGo } from "./pictures.js";

/** Throws ApiError for a file that the browser cannot show. */
export async function checkPicture(blob) {
  try {
    (await createImageBitmap(blob)).close();
  } catch {
    throw new ApiError(`${blob.name ?? "This file"} is no picture that can be read here. Use a PNG, JPEG or WebP.`);
  }
}

/** The files of a drop. A picture dragged from this very page arrives as a file in Chromium, but only as its address in Firefox. */
function filesOf(transfer) {
  const own = [...document.images].find((image) => image.blob && image.src === transfer.getData("text/uri-list"));
  return own && !transfer.files.length ? [own.blob] : [...transfer.files];
}

export class Pictures {
  /** place: an element with [data-drop] inside. most: how many it holds, newest last. before(), changed(list): called around a change. */
  constructor(place, { most = Infinity, changed = () => {}, before = () => {} } = {}) {
    Object.assign(this, { most, changed, before, list: [] });
    this.drop = place.querySelector("[data-drop]");
    this.thumbs = this.drop.querySelector("[data-thumbs]");
    const input = this.drop.querySelector("input");
    input.addEventListener("change", () => { this.add([...input.files]); input.value = ""; });
    this.drop.addEventListener("dragover", (event) => { event.preventDefault(); this.drop.classList.add("over"); });
    this.drop.addEventListener("dragleave", () => this.drop.classList.remove("over"));
    this.drop.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      this.drop.classList.remove("over");
      document.dispatchEvent(new Event("dropped"));
      const files = filesOf(event.dataTransfer);
      if (files.length) this.add(files);
      else showError(new ApiError("No file was dropped. Save the picture first, then drop its file."));
    });
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      // Office programs copy text together with a picture of it: then the text is meant.
      if (place.hidden || !files.length || event.clipboardData.getData("text/plain")) return;
      event.preventDefault();
      this.add(files);
    });
  }

  async add(blobs) {
    try {
      for (const blob of blobs) await checkPicture(blob);
    } catch (error) {
      showError(error);
      return;
    }
    const over = this.list.length + blobs.length - this.most;
    if (this.most > 1 && over > 0) note(`At most ${this.most} pictures: the first ${over} were left out.`);
    if (blobs.length) this.set([...this.list, ...blobs].slice(-this.most));
  }

  set(list, { quiet = false } = {}) {
    if (!quiet) this.before();
    this.list = list;
    letGo(this.thumbs);
    this.thumbs.replaceChildren(...list.map((blob, i) => {
      const remove = make("button", { type: "button", textContent: "✕", ariaLabel: `Remove picture ${i + 1}` });
      remove.addEventListener("click", () => this.set(this.list.filter((_, j) => j !== i)));
      return make("div", { className: "thumb" }, imageOf(blob, `picture ${i + 1}`), remove);
    }));
    this.changed(list);
  }
}
