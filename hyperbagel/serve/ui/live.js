// The Live tab: every change of the prompt, a scale, the seed or the picture requests a preview; a pause then requests a better picture.

import { address, ApiError, askKey, getKey } from "./api.js";
import { Pictures } from "./files.js";
import { clearError, ms, onEscape, showError, showRanges } from "./page.js";
import { download, TINY } from "./pictures.js";
import { seedIn, toDataUrl } from "./png.js";
import { Seed } from "./settings.js";

const PAUSE = 400;  // ms without input before the better tier is requested
const REMEMBERED = 200;  // how many previews' times are kept

export function setUpLive(panel, card, { editThis }) {
  const part = (name) => panel.querySelector(`[data-${name}]`);
  const field = (name) => panel.querySelector(`[name=${name}]`);
  const canvas = part("picture");
  const state = {
    id: 0,  // of the latest message
    asked: new Map(),  // requests without an answer: id -> when the input came
    shown: 0,  // id of the request whose picture is shown
    blob: null, seed: null,  // of the picture that is shown
    pause: 0,  // timer
    paused: false,  // the timer has run out
    preview: null,  // id of the latest request, if it is for a preview
    same: false,  // the better tier is no better than the preview
    failed: false,  // an error is shown
    source: Promise.resolve(),  // once the picture to edit has been sent
    samples: [],  // times of previews
  };
  const seed = new Seed(part("seed"), { locked: true, changed: () => ask("preview") });
  const line = new Line(panel, { json: take, picture: show, open: () => { state.asked.clear(); settle(); sendSource(); ask("preview"); } });

  const pictures = new Pictures(panel, { most: 1, changed: (list) => {
    if (list[0] && (list[0].size * 4) / 3 + 1000 > card.limits.body_bytes) {
      pictures.set([]);
      showError(new ApiError("This picture is too large for Live; make it smaller.", 413));
      return;
    }
    part("edit").hidden = !list.length;
    sendSource();
    ask("preview");
  } });
  const student = Object.values(card.samplers).sort((a, b) => a.nfe - b.nfe)[0];
  if (student) {
    Object.assign(field("text_scale"), { min: student.text_range[0], max: student.text_range[1], value: student.text_scale });
    Object.assign(field("image_scale"), { min: student.image_range[0], max: student.image_range[1], value: student.edit_image_scale });
  }
  for (const scale of [field("text_scale"), field("image_scale")]) {
    if (!student) scale.value = scale.defaultValue;  // Firefox keeps a moved one over a reload
    scale.dataset.usual = scale.value;
  }
  showRanges(panel);

  for (const name of ["prompt", "text_scale", "image_scale"]) field(name).addEventListener("input", (event) => ask("preview", event.timeStamp));
  part("full").addEventListener("click", () => ask("full"));
  part("cancel").addEventListener("click", stop);
  panel.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  onEscape(panel, stop);
  part("use").disabled = part("save").disabled = true;  // set here as well: Firefox restores a button's state after a reload
  part("use").addEventListener("click", () => editThis(state.blob));
  part("save").addEventListener("click", () => download(state.blob, `hyperbagel-${state.seed}.png`));

  /** Requests the better tier after a pause, but not before the preview is shown: on a slow machine that would delay the preview. */
  function improve() { if (state.paused && state.preview === state.shown && !state.same) ask("better"); }

  function stop() {
    clearTimeout(state.pause);
    state.paused = false;
    line.send({ type: "stop" });
  }

  /** A scale for a request. One that stands where it stood is left out: who draws then takes its own, which differ from tier to tier. */
  function moved(name) {
    const scale = field(name);
    return scale.value === scale.dataset.usual ? {} : { [name]: Number(scale.value) };
  }

  /** Requests a picture from what the form holds. since: when the input came, in ms on the page's clock. */
  function ask(tier, since = performance.now()) {
    clearTimeout(state.pause);
    const prompt = field("prompt").value.trim();
    if (!prompt || !line.ready) return;
    const message = { type: "draw", id: ++state.id, tier, prompt, seed: tier !== "preview" && seed.valid ? seed.input.value : seed.take(), ...moved("text_scale") };
    if (pictures.list.length) Object.assign(message, moved("image_scale"));
    state.asked.set(message.id, since);
    state.source.then(() => line.send(message));
    panel.setAttribute("aria-busy", "true");
    Object.assign(state, { preview: tier === "preview" ? message.id : null, paused: false });
    if (tier === "preview") state.pause = setTimeout(() => { state.paused = true; improve(); }, PAUSE);
  }

  function sendSource() {
    if (!line.ready) return;
    const [blob] = pictures.list;
    const read = blob ? toDataUrl(blob) : Promise.resolve(null);
    state.source = read.then((image) => line.send({ type: "source", id: ++state.id, image }), () => {
      pictures.set([]);  // the file has changed or gone since it was chosen
      showError(new ApiError("The picture can no longer be read. Choose it again."));
    });
  }

  /** Acts on a JSON message of the server. */
  function take(message) {
    if (message.type === "ready") {
      state.same = JSON.stringify(message.tiers.preview) === JSON.stringify(message.tiers.better);
      const who = ({ student, steps }) => (student === "none" ? (steps ? `the model in ${steps} steps` : "the model") : `student ${student}`);
      part("tiers").textContent = `While you type: ${who(message.tiers.preview)}. On a pause: ${who(message.tiers.better)}. Full quality: ${who(message.tiers.full)}. Each has scales of its own until you move one.`;
    } else if (message.type === "cancelled") {
      state.asked.delete(message.id);
      panel.dataset.cancelled = Number(panel.dataset.cancelled ?? 0) + 1;
      settle();
    } else if (message.type === "error") {
      state.asked.delete(message.id);
      settle();
      state.failed = true;
      showError(new ApiError(message.error.message, 400, message.error.code));
    }
  }

  function settle() { if (!state.asked.size) panel.removeAttribute("aria-busy"); }

  /** Shows a picture, and below it its times from the input to the pixels on the screen. */
  async function show(header, blob) {
    const since = state.asked.get(header.id);
    const arrived = performance.now();
    state.asked.delete(header.id);
    settle();
    if (header.id < state.shown) return;
    state.shown = header.id;
    const bitmap = await createImageBitmap(blob);
    if (header.id < state.shown) return;  // a newer picture came while this one was unpacked
    if (state.failed) {
      state.failed = false;
      clearError();
    }
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
    canvas.classList.toggle("tiny", bitmap.width <= TINY);
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    const pixels = await painted();
    Object.assign(state, { blob, seed: header.seed });
    part("use").disabled = part("save").disabled = false;
    part("tier").textContent = { preview: "Preview", better: "Better", full: "Full quality" }[header.tier] + `, ${header.nfe} NFE, seed ${header.seed}`;
    const { wait, prefill, denoise, decode, encode } = header.timings;
    const rest = (pixels - since) / 1000 - header.server;
    const stages = { wait, prefill, denoise, decode, encode, "network and browser": rest };
    const reused = header.reused ? ` (${header.reused} tokens of the picture reused)` : "";
    const list = Object.entries(stages).map(([name, seconds]) => `${name} ${ms(seconds)}${name === "prefill" ? reused : ""}`).join(" · ");
    part("timings").textContent = `${ms((pixels - since) / 1000)} from input to pixels: ${list}`;
    Object.assign(panel.dataset, { shown: header.id, tier: header.tier, reused: header.reused });
    if (header.tier !== "preview") return;
    improve();
    state.samples.push({ pixels: pixels - since, roundTrip: arrived - since, server: header.server * 1000, nfe: header.nfe, reused: header.reused, ...header.timings });
    if (state.samples.length > REMEMBERED) state.samples.shift();
    const sorted = state.samples.map((sample) => sample.pixels).sort((a, b) => a - b);
    part("median").textContent = `Median of ${sorted.length} preview${sorted.length > 1 ? "s" : ""}: ${ms(sorted[sorted.length >> 1] / 1000)}`;
  }

  window.hyperbagelLive = { samples: state.samples };  // what benchmarks/live.py reads
  return { enter: () => line.open() };
}

/** Resolves, with the time, when what was just drawn is on the screen: a message posted in a frame's callback arrives after that frame. */
function painted() {
  return new Promise((resolve) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => resolve(performance.now());
    channel.port2.postMessage(null);
  }));
}

/** The WebSocket, opened when the tab is first shown, and again after it breaks.
 *  on: json(message) and picture(header, blob) for what comes, open() when the server is ready. */
class Line {
  constructor(panel, on) {
    Object.assign(this, { on, ready: false, socket: null, wait: 500, label: panel.querySelector("[data-link]") });
  }

  send(message) { if (this.ready) this.socket.send(JSON.stringify(message)); }

  open() {
    if (this.socket) return;
    const url = address("v1/live");
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.label.textContent = "connecting …";
    socket.onopen = () => socket.send(JSON.stringify({ type: "hello", key: getKey() }));
    socket.onmessage = ({ data }) => {
      if (typeof data !== "string") {
        const length = new DataView(data).getUint32(0);
        const text = new TextDecoder().decode(new Uint8Array(data, 4, length));
        const header = { ...JSON.parse(text), seed: seedIn(text) };
        this.on.picture(header, new Blob([new Uint8Array(data, 4 + length)], { type: "image/png" })).catch(showError);
        return;
      }
      const message = JSON.parse(data);
      if (message.error?.code === "invalid_api_key") {
        this.refused = true;
        return;
      }
      if (message.type === "ready") {
        Object.assign(this, { ready: true, wait: 500 });
        this.label.textContent = "connected";
      }
      this.on.json(message);
      if (message.type === "ready") this.on.open();
    };
    socket.onclose = async () => {
      Object.assign(this, { ready: false, socket: null });
      this.label.textContent = "not connected";
      if (this.refused) {
        this.refused = false;
        if (await askKey()) this.open();
        return;
      }
      setTimeout(() => this.open(), this.wait);
      this.wait = Math.min(10000, this.wait * 2);
    };
  }
}
