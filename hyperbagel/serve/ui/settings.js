// The settings of a picture: who draws, steps, scales, size, number, seed. An empty field means the model's or the student's own value.

import { clone, make, showRanges } from "./page.js";

export const KNOWN = [["6", "6 evaluations"], ["1", "1 evaluation"]];  // the paper's students, listed even if they are not installed

const newSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0] >>> 1);

/** The seed's field, which always shows the seed in use. Unless "Keep" is checked, each start takes a new one. */
export class Seed {
  /** locked: "Keep" is checked at first. changed(): called when the user has changed the seed. */
  constructor(place, { locked = false, changed = () => {} } = {}) {
    place.replaceChildren(clone("t-seed"));
    this.input = place.querySelector("[name=seed]");
    this.lock = place.querySelector("[name=lock]");
    this.input.value = newSeed();
    this.lock.checked = locked;
    this.fresh = true;  // the seed in the field has not been used yet
    this.input.addEventListener("input", () => { this.fresh = true; this.lock.checked = true; if (this.valid) changed(); });
    place.querySelector("[data-dice]").addEventListener("click", () => { this.input.value = newSeed(); this.fresh = true; changed(); });
  }

  get valid() { return /^\d+$/.test(this.input.value); }

  /** The seed for a new start, as text: it may exceed what a JavaScript number holds exactly. */
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

/** Choices "WIDTHxHEIGHT" besides the usual size: other aspect ratios of about its area, in multiples of the stride. */
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
  /** place: where the fields go. card: the model's, from /v1/models. kind: "draw" or "edit". */
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
    place.addEventListener("change", () => this.warn());
    this.follow();
    showRanges(place);
  }

  /** Shows the usual values of the student that draws, or of the model itself. */
  follow() {
    const name = this.field("student").value;
    const own = this.card.samplers[name];
    const edit = this.kind === "edit";
    this.field("steps").placeholder = own?.nfe ?? this.usual.steps;
    this.field("shift").placeholder = own?.shift ?? this.usual.shift;
    this.field("low").placeholder = this.usual.interval[0];
    this.field("high").placeholder = this.usual.interval[1];
    this.field("renorm_min").placeholder = this.usual.renorm_min;
    for (const field of ["low", "high", "renorm", "renorm_min"]) this.field(field).disabled = Boolean(own);  // a student has its own
    this.range("text_scale", own?.text_range ?? [1, 8], own ? (edit ? own.edit_text_scale : own.text_scale) : this.usual.text_scale);
    this.range("image_scale", own?.image_range ?? [1, 4], own ? own.edit_image_scale : this.usual.image_scale);
  }

  /** Says if the model is asked for plans that it was not trained for. */
  warn() { this.place.querySelector("[data-unplanned]").hidden = this.card.plans[this.kind] || !this.field("think").checked; }

  /** Sets a range's bounds and value. */
  range(name, [low, high], value) {
    const input = this.field(name);
    Object.assign(input, { min: low, max: high });
    input.value = value;
    input.closest("label").querySelector("output").textContent = input.value;
  }

  /** The fields of a request's body. */
  read() {
    const text = (name) => this.field(name).value.trim();
    const body = { student: text("student"), seed: this.seed.take(), text_scale: Number(text("text_scale")), n: Number(text("n") || 1) };
    if (this.kind === "edit") body.image_scale = Number(text("image_scale"));
    if (text("size")) body.size = text("size");
    if (this.field("think").checked) {
      body.think = true;
      if (text("think_temperature")) body.think_temperature = Number(text("think_temperature"));
    }
    for (const name of ["steps", "shift"]) if (text(name)) body[name] = Number(text(name));
    if (body.student === "none") {
      if (text("low") || text("high")) body.interval = [Number(text("low") || this.usual.interval[0]), Number(text("high") || this.usual.interval[1])];
      if (text("renorm")) body.renorm = text("renorm");
      if (text("renorm_min")) body.renorm_min = Number(text("renorm_min"));
    }
    return body;
  }

  /** Sets every field from a picture's settings. Returns remarks on what cannot be restored. */
  restore(settings) {
    const remarks = [];
    const who = settings.student ?? "none";
    const there = who === "none" || this.card.students.includes(who);
    if (!there) remarks.push(`student ${who} is not installed here`);
    if (settings.model !== undefined && settings.model.split("/").pop() !== this.card.id) remarks.push(`it was made with the model ${settings.model}`);
    this.field("student").value = there ? who : "none";
    this.follow();
    const put = (name, value) => { if (value !== undefined && value !== null) this.field(name).value = value; };
    // A usual value leaves its field empty, so that another student, chosen next, gets its own.
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
      input.step = "any";
      this.range(name, [Math.min(input.min, value), Math.max(input.max, value)], value);
    }
    const size = settings.size?.join("x") ?? "";
    const select = this.field("size");
    const usual = this.kind === "draw" && size === this.card.size.usual.join("x");
    if (size && !usual && ![...select.options].some((option) => option.value === size)) select.append(make("option", { textContent: size }));
    select.value = usual ? "" : size;
    this.field("n").value = 1;
    this.field("think").checked = Boolean(settings.think);
    this.warn();
    own("think_temperature", settings.think_temperature ?? 0);
    this.seed.set(settings.seed);
    return remarks;
  }
}
