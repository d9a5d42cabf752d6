// A mask painted over a picture with a brush. Painted parts may change; the server gets them as transparency, as in OpenAI's API.

import { ApiError } from "./api.js";
import { TINY } from "./pictures.js";

const PAINTED = 1024;  // longest side of the canvas in pixels: each undo holds a copy of it

/** Whether the browser falsifies what a page reads from a canvas, as some do against fingerprinting. */
function scrambled() {
  const blank = document.createElement("canvas").getContext("2d");
  return blank.getImageData(0, 0, 16, 16).data.some(Boolean);
}

export class Mask {
  /** place: an element with the picture, the canvas and the brush's controls. before(): called before each change of the paint. */
  constructor(place, { before = () => {} } = {}) {
    Object.assign(this, { place, before });
    this.image = place.querySelector("img");
    this.canvas = place.querySelector("canvas");
    this.cursor = place.querySelector(".cursor");
    this.size = place.querySelector("[data-size]");
    this.erase = place.querySelector("[data-erase]");
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
    this.used = false;  // painted on since it was cleared; kept apart, since reading the canvas may not be reliable (see `scrambled`)
    this.at = null;  // [x, y] of the keyboard's brush, in pixels of the canvas
    place.querySelector("[data-clear]").addEventListener("click", () => { this.before(); this.clear(); });
    this.size.addEventListener("input", () => this.showCursor());
    this.listen();
  }

  /** Shows the picture to paint on, without paint; null hides the mask. Resolves when the picture is loaded. */
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
    this.image.classList.toggle("tiny", this.image.naturalWidth <= TINY);
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

  /** A PNG of the picture's size, transparent where it is painted; null without paint. */
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
    this.pen.lineTo(to[0] + 0.001, to[1]);  // never of length 0, which would draw nothing for a single dot
    this.pen.stroke();
    this.used = true;
  }

  /** Moves the brush, so that the keyboard continues where the pointer was. */
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
    let held = false;  // a key held down paints one stroke, with one undo
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
