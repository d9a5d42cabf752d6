// A brush over a picture. What is painted may change; the server gets it as transparency, as OpenAI's API wants it.

import { ApiError } from "./api.js";

const PAINTED = 1024;  // longest side of what is painted on: each undo holds all of it

/** Whether something else is read from a canvas than what is on it: some browsers do so against fingerprinting. */
function scrambled() {
  const blank = document.createElement("canvas").getContext("2d");
  return blank.getImageData(0, 0, 16, 16).data.some(Boolean);
}

export class Mask {
  constructor(place, { before = () => {} } = {}) {
    Object.assign(this, { place, before });
    this.image = place.querySelector("img");
    this.canvas = place.querySelector("canvas");
    this.cursor = place.querySelector(".cursor");
    this.size = place.querySelector("[data-size]");
    this.erase = place.querySelector("[data-erase]");
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
    this.used = false;  // nothing was painted since it was cleared; what is read from the canvas need not be true
    this.at = null;  // where the keyboard's brush is, in pixels of the picture
    place.querySelector("[data-clear]").addEventListener("click", () => { this.before(); this.clear(); });
    this.size.addEventListener("input", () => this.showCursor());
    this.listen();
  }

  /** The picture to paint on; null for none. Resolves when it stands there, without paint. */
  async load(blob) {
    this.place.hidden = blob === null;
    if (this.image.src) URL.revokeObjectURL(this.image.src);
    this.image.removeAttribute("src");
    if (blob === null) {
      this.clear();
      return;
    }
    this.image.src = URL.createObjectURL(blob);
    await this.image.decode();
    this.image.classList.toggle("tiny", this.image.naturalWidth <= 200);
    const { naturalWidth: width, naturalHeight: height } = this.image;
    const scale = Math.min(1, PAINTED / Math.max(width, height));
    Object.assign(this.canvas, { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) });  // this clears it, too
    Object.assign(this, { used: false, at: [this.canvas.width / 2, this.canvas.height / 2] });
  }

  clear() {
    this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.used = false;
  }

  get empty() {
    if (!this.used || !this.canvas.width || !this.canvas.height) return true;
    const { data } = this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height);
    for (let i = 3; i < data.length; i += 4) if (data[i]) return false;
    return true;
  }

  snapshot() { return this.empty ? null : this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height); }

  restore(snapshot) {
    this.clear();
    if (!snapshot || snapshot.width !== this.canvas.width || snapshot.height !== this.canvas.height) return;
    this.pen.putImageData(snapshot, 0, 0);
    this.used = true;
  }

  /** A PNG of the picture's size that is transparent where it is painted; null without paint. */
  async file() {
    if (this.empty) return null;
    if (scrambled()) throw new ApiError("This browser puts noise where a page reads a canvas (protection against fingerprinting), so the mask cannot be sent. Allow this page to read it, or clear the mask.");
    const out = new OffscreenCanvas(this.image.naturalWidth, this.image.naturalHeight);
    const pen = out.getContext("2d");
    pen.fillRect(0, 0, out.width, out.height);
    pen.globalCompositeOperation = "destination-out";
    pen.drawImage(this.canvas, 0, 0, out.width, out.height);
    return out.convertToBlob({ type: "image/png" });
  }

  get radius() { return Math.max(0.5, (Number(this.size.value) / 100) * Math.min(this.canvas.width, this.canvas.height)); }

  stroke(from, to) {
    this.pen.globalCompositeOperation = this.erase.checked ? "destination-out" : "source-over";
    this.pen.strokeStyle = getComputedStyle(this.place).getPropertyValue("--mask").trim() || "#d3006f";
    Object.assign(this.pen, { lineWidth: 2 * this.radius, lineCap: "round" });
    this.pen.beginPath();
    this.pen.moveTo(...from);
    this.pen.lineTo(to[0] + 0.001, to[1]);  // a dot is a line too
    this.pen.stroke();
    this.used = true;
  }

  /** The brush goes there, so that the keyboard goes on where the pen was. */
  moveTo(place) {
    const reach = [this.canvas.width, this.canvas.height];
    this.at = place.map((value, i) => Math.min(reach[i], Math.max(0, value)));
    this.showCursor();
  }

  showCursor(visible = document.activeElement === this.canvas) {
    this.cursor.hidden = !visible || !this.at;
    if (this.cursor.hidden) return;
    const diameter = `${(200 * this.radius) / this.canvas.width}%`;
    Object.assign(this.cursor.style, { left: `${(100 * this.at[0]) / this.canvas.width}%`, top: `${(100 * this.at[1]) / this.canvas.height}%`, width: diameter, aspectRatio: "1" });
  }

  listen() {
    const { canvas } = this;
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
    };
    let last = null;
    let held = false;  // a key that is held down is one stroke, and one undo
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.before();
      canvas.setPointerCapture(event.pointerId);
      last = point(event);
      this.stroke(last, last);
      this.moveTo(last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      for (const one of event.getCoalescedEvents?.() ?? [event]) { const next = point(one); this.stroke(last, next); last = next; }
      this.moveTo(last);
    });
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => { last = null; });
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    canvas.addEventListener("keydown", (event) => {
      const way = ways[event.key];
      if (!this.at || !(way || event.key === " ")) return;
      event.preventDefault();
      const from = this.at;
      if (way) this.moveTo(from.map((value, i) => value + way[i] * this.radius));
      if (!way || event.shiftKey) {
        if (!held) this.before();
        held = true;
        this.stroke(from, this.at);
      }
    });
    canvas.addEventListener("keyup", (event) => { if ([" ", "Shift"].includes(event.key)) held = false; });
    canvas.addEventListener("focus", () => this.showCursor());
    canvas.addEventListener("blur", () => { held = false; this.showCursor(false); });
  }
}
