// The settings of a picture: who draws, steps, scales, size, number, seed. An empty field leaves the model's or the student's own value.

import { clone, make, showRanges } from "./page.js";

export const KNOWN = [["6", "6 evaluations"], ["1", "1 evaluation"]];  // students that the paper makes

const newSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0] >>> 1);

/** A seed that is always visible; unless it is kept, each start draws another one. */
export class Seed {
  constructor(place, { locked = false, changed = () => {} } = {}) {
    place.replaceChildren(clone("t-seed"));
    this.input = place.querySelector("[name=seed]");
    this.lock = place.querySelector("[name=lock]");
    this.input.value = newSeed();
    this.lock.checked = locked;
    this.fresh = true;  // the seed that stands there has not been used
    this.input.addEventListener("input", () => { this.fresh = true; this.lock.checked = true; if (this.valid) changed(); });
    place.querySelector("[data-dice]").addEventListener("click", () => { this.input.value = newSeed(); this.fresh = true; changed(); });
  }

  get valid() { return /^\d+$/.test(this.input.value); }

  /** The seed of a new start, as text: it may be larger than what a number holds exactly. */
  take() {
    if (!this.valid || (!this.lock.checked && !this.fresh)) this.input.value = newSeed();
    this.fresh = false;
    return this.input.value;
  }

  set(value) {
    this.input.value = value;
    this.lock.checked = true;
  }
}

/** [width, height] choices of about the usual area, in steps of the stride. */
function sizes({ usual: [width, height], stride, largest }) {
  const area = width * height;
  const found = [];
  for (const [w, h] of [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]]) {
    const scale = Math.sqrt(area / (w * h));
    const size = [w, h].map((side) => Math.min(largest, Math.max(stride, Math.round((side * scale) / stride) * stride))).join("x");
    if (size !== `${width}x${height}` && !found.includes(size)) found.push(size);
  }
  return found;
}

export class Settings {
  /** place: where the fields go. kind: "draw" or "edit", whose usual values are shown. */
  constructor(place, card, kind) {
    Object.assign(this, { place, card, kind, usual: card.usual[kind] });
    place.replaceChildren(clone("t-settings"));
    this.seed = new Seed(place.querySelector("[data-seed]"));
    this.field = (name) => place.querySelector(`[name=${name}]`);
    place.querySelector("[data-edit]").hidden = kind !== "edit";
    const who = this.field("student");
    who.append(make("option", { value: "none", textContent: "the model itself" }));
    const names = [...new Set([...KNOWN.map(([name]) => name), ...card.students])];
    for (const name of names) {
      const there = card.students.includes(name);
      const nfe = there ? `${card.samplers[name].nfe} evaluations` : "not installed";
      who.append(make("option", { value: name, textContent: `student ${name} (${nfe})`, disabled: !there }));
    }
    const auto = kind === "edit" ? "as the source" : card.size.usual.join("x");
    this.field("size").append(make("option", { value: "", textContent: auto }), ...sizes(card.size).map((size) => make("option", { textContent: size })));
    this.field("n").max = card.limits.n;
    this.field("steps").max = card.limits.steps;
    who.addEventListener("change", () => this.follow());
    this.follow();
    showRanges(place);
  }

  /** Shows the usual values of whoever draws. */
  follow() {
    const name = this.field("student").value;
    const own = this.card.samplers[name];
    const edit = this.kind === "edit";
    this.field("steps").placeholder = own?.nfe ?? this.usual.steps;
    this.field("shift").placeholder = own?.shift ?? this.usual.shift;
    this.field("low").placeholder = this.usual.interval[0];
    this.field("high").placeholder = this.usual.interval[1];
    this.field("renorm_min").placeholder = this.usual.renorm_min;
    for (const field of ["low", "high", "renorm", "renorm_min"]) this.field(field).disabled = Boolean(own);  // a student has its guidance inside
    this.range("text_scale", own?.text_range ?? [1, 8], own ? (edit ? own.edit_text_scale : own.text_scale) : this.usual.text_scale);
    this.range("image_scale", own?.image_range ?? [1, 4], own ? own.edit_image_scale : this.usual.image_scale);
  }

  range(name, [low, high], value) {
    const input = this.field(name);
    Object.assign(input, { min: low, max: high });
    input.value = value;
    input.closest("label").querySelector("output").textContent = input.value;
  }

  /** Fields of a request's body. */
  read() {
    const text = (name) => this.field(name).value.trim();
    const body = { student: text("student"), seed: this.seed.take(), text_scale: Number(text("text_scale")), n: Number(text("n") || 1) };
    if (this.kind === "edit") body.image_scale = Number(text("image_scale"));
    if (text("size")) body.size = text("size");
    if (this.field("think").checked) body.think = true;
    for (const name of ["steps", "shift"]) if (text(name)) body[name] = Number(text(name));
    if (body.student === "none") {
      if (text("low") || text("high")) body.interval = [Number(text("low") || this.usual.interval[0]), Number(text("high") || this.usual.interval[1])];
      if (text("renorm")) body.renorm = text("renorm");
      if (text("renorm_min")) body.renorm_min = Number(text("renorm_min"));
    }
    return body;
  }

  /** Sets every field to what a picture's settings say. Returns remarks on what cannot be restored. */
  restore(settings) {
    const remarks = [];
    const who = settings.student ?? "none";
    const there = who === "none" || this.card.students.includes(who);
    if (!there) remarks.push(`student ${who} is not installed here`);
    if (settings.model !== undefined && settings.model.split("/").pop() !== this.card.id) remarks.push(`it was made with the model ${settings.model}`);
    this.field("student").value = there ? who : "none";
    this.follow();
    const put = (name, value) => { if (value !== undefined && value !== null) this.field(name).value = value; };
    // what is usual stays open: another student that is chosen next has its own
    const own = (name, value) => put(name, String(value) === this.field(name).placeholder ? "" : value);
    own("steps", settings.num_steps);
    own("shift", settings.shift);
    if (who === "none") {
      put("low", settings.interval?.[0]);
      put("high", settings.interval?.[1]);
      put("renorm", settings.renorm);
      put("renorm_min", settings.renorm_min);
    }
    for (const name of ["text_scale", "image_scale"]) {
      const input = this.field(name);
      const value = settings[name];
      if (value === undefined) continue;
      Object.assign(input, { min: Math.min(input.min, value), max: Math.max(input.max, value), step: "any" });
      input.value = value;
      input.closest("label").querySelector("output").textContent = input.value;
    }
    const size = settings.size?.join("x") ?? "";
    const select = this.field("size");
    const usual = this.kind === "draw" && size === this.card.size.usual.join("x");
    if (size && !usual && ![...select.options].some((option) => option.value === size)) select.append(make("option", { textContent: size }));
    select.value = usual ? "" : size;
    this.field("n").value = 1;
    this.field("think").checked = Boolean(settings.think);
    this.seed.set(settings.seed);
    return remarks;
  }
}
