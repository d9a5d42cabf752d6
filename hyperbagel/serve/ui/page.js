// What all tabs share: messages, small helpers, and running work that can be cancelled.

const alertBox = document.getElementById("alert");
const noteBox = document.getElementById("note");
alertBox.querySelector("[data-close]").addEventListener("click", () => { alertBox.hidden = true; });

/** Shows an error at the top of the page, unless it is a cancellation. again: what the button "Try again" does; null for no button. */
export function showError(error, { again = null } = {}) {
  if (error?.name === "AbortError") return;
  console.warn(error);
  const retry = alertBox.querySelector("[data-again]");
  retry.hidden = !again;
  alertBox.querySelector("[data-close]").hidden = Boolean(again);  // without another try the page does not work
  retry.onclick = () => { clearError(); again(); };
  alertBox.querySelector("span").textContent = error?.status !== undefined ? error.message : `Something in the page went wrong: ${error?.message ?? error}`;
  alertBox.hidden = false;
}

export function clearError() { alertBox.hidden = true; }

let noteTimer;
/** Shows a remark for eight seconds. */
export function note(text) {
  noteBox.textContent = text;
  noteBox.hidden = false;
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => { noteBox.hidden = true; }, 8000);
}

/** Tells screen readers that something has ended. */
function say(text) { document.getElementById("said").textContent = text; }

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A time as text, with a no-break space before the unit. */
export const ms = (seconds) => (seconds < 10 ? `${Math.round(seconds * 1000)}\u00a0ms` : `${seconds.toFixed(1)}\u00a0s`);
export const clone = (id) => document.getElementById(id).content.cloneNode(true);

/** Shows each range's value next to it, and keeps it up to date. At data-usual, if it has that, it stands for no value. */
export function showRanges(root) {
  const told = (input) => (input.value === input.dataset.usual ? "as usual" : input.value);
  const update = (input) => { input.closest("label").querySelector("output").textContent = told(input); };
  for (const input of root.querySelectorAll("label.range input")) update(input);
  root.addEventListener("input", (event) => { if (event.target.closest("label.range")) update(event.target); });
}

/** Calls `stop` on Escape while the panel is shown. Listens on the document: the button just pressed is disabled and has lost the focus. */
export function onEscape(panel, stop) {
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !panel.hidden) stop(); });
}

/** Submitting the panel's form runs `work(signal)`, which resolves to what screen readers hear at its end. Cancel and Escape abort it.
 *  Ctrl+Enter in a text field submits; so does Enter if the form has data-enter. */
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
  // An invalid field inside a closed "More settings" must be opened, or the browser cannot point at it.
  form.addEventListener("invalid", (event) => event.target.closest("details")?.setAttribute("open", ""), true);
  panel.addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229;  // 229: Safari reports the Enter that ends a composition after its end
    if (event.key === "Enter" && !composing && event.target.tagName === "TEXTAREA" && (event.ctrlKey || event.metaKey || form.dataset.enter)) {
      if (event.shiftKey) return;
      event.preventDefault();
      form.requestSubmit();
    }
  });
}
