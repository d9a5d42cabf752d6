// What all tabs share: messages, small helpers, running work that can be cancelled.

const alertBox = document.getElementById("alert");
const noteBox = document.getElementById("note");
alertBox.querySelector("[data-close]").addEventListener("click", () => { alertBox.hidden = true; });

/** again: what "Try again" does, where that may help. */
export function showError(error, { again = null } = {}) {
  if (error?.name === "AbortError") return;
  console.warn(error);
  const retry = alertBox.querySelector("[data-again]");
  retry.hidden = !again;
  alertBox.querySelector("[data-close]").hidden = Boolean(again);  // nothing else would help
  retry.onclick = () => { clearError(); again(); };
  alertBox.querySelector("span").textContent = error?.status !== undefined ? error.message : `Something in the page went wrong: ${error?.message ?? error}`;
  alertBox.hidden = false;
}

export function clearError() { alertBox.hidden = true; }

let noteTimer;
export function note(text) {
  noteBox.textContent = text;
  noteBox.hidden = false;
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => { noteBox.hidden = true; }, 8000);
}

/** Tells who does not see the page that something has ended. */
function say(text) { document.getElementById("said").textContent = text; }

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** With a space that does not break. */
export const ms = (seconds) => (seconds < 10 ? `${Math.round(seconds * 1000)}\u00a0ms` : `${seconds.toFixed(1)}\u00a0s`);
export const clone = (id) => document.getElementById(id).content.cloneNode(true);

/** A figure next to each range of a form, kept up to date. */
export function showRanges(root) {
  const update = (input) => { input.closest("label").querySelector("output").textContent = input.value; };
  for (const input of root.querySelectorAll("label.range input")) update(input);
  root.addEventListener("input", (event) => { if (event.target.closest("label.range")) update(event.target); });
}

/** While the panel is shown; on the document, since a button that is pressed is disabled then, and the focus is nowhere. */
export function onEscape(panel, stop) {
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !panel.hidden) stop(); });
}

/** Submitting starts `work(signal)`, which gives the words that say it is done; Cancel and Escape end it. Ctrl+Enter in a text submits. */
export function runner(panel, work) {
  const form = panel.querySelector("form");
  const cancel = panel.querySelector("[data-cancel]");
  const submit = form.querySelector("[type=submit]");
  let controller = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (controller) return;
    controller = new AbortController();
    submit.disabled = true;
    cancel.disabled = false;
    panel.setAttribute("aria-busy", "true");
    clearError();
    say("");
    try {
      say(await work(controller.signal));
    } catch (error) {
      showError(error);
      if (error?.name === "AbortError") say("Cancelled.");
    } finally {
      controller = null;
      submit.disabled = false;
      cancel.disabled = true;
      panel.removeAttribute("aria-busy");
    }
  });
  cancel.addEventListener("click", () => controller?.abort());
  onEscape(panel, () => controller?.abort());
  // a wrong value behind a closed "More settings" could not be shown
  form.addEventListener("invalid", (event) => event.target.closest("details")?.setAttribute("open", ""), true);
  panel.addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229;  // Safari tells the end of a composition before the Enter that ended it
    if (event.key === "Enter" && !composing && event.target.tagName === "TEXTAREA" && (event.ctrlKey || event.metaKey || form.dataset.enter)) {
      if (event.shiftKey) return;
      event.preventDefault();
      form.requestSubmit();
    }
  });
}
