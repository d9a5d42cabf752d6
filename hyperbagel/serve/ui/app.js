// Starts the page: loads the model's card, switches tabs, restores the settings of a dropped picture.

import { ApiError, getJson } from "./api.js";
import { setUpAsk } from "./ask.js";
import { setUpCompare } from "./compare.js";
import { setUpDraw } from "./draw.js";
import { setUpEdit } from "./edit.js";
import { checkPicture } from "./files.js";
import { setUpLive } from "./live.js";
import { clearError, note, showError } from "./page.js";
import { readSettings } from "./png.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const panelOf = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
const parts = {};  // what the tabs offer to each other, by name

/** Shows the tab of this name, or the first. */
function choose(name, { focus = false } = {}) {
  const chosen = tabs.find((tab) => panelOf(tab).id === name) ?? tabs[0];
  if (document.body.dataset.ready && chosen.getAttribute("aria-selected") !== "true") clearError();  // it belonged to the tab that is left
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", tab === chosen);
    tab.tabIndex = tab === chosen ? 0 : -1;
    panelOf(tab).hidden = tab !== chosen;
  }
  if (focus) chosen.focus();
  const id = panelOf(chosen).id;
  if (location.hash !== `#${id}`) history.replaceState(null, "", `#${id}`);
  parts[id]?.enter?.();
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => choose(panelOf(tab).id));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1 + tabs.length, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(panelOf(tabs[to % tabs.length]).id, { focus: true });
  });
}
window.addEventListener("hashchange", () => choose(location.hash.slice(1)));

/** Opens a picture of any tab in the Edit tab. */
function editThis(blob) {
  parts.edit.use(blob);
  choose("edit");
  document.querySelector("#edit [name=prompt]").focus();
}

/** Sets the page as it was when a picture was made, from the settings inside its PNG. */
async function restoreFrom(blob) {
  if (!blob || !parts.draw) return;  // no file was dropped, or the page is not ready
  clearError();
  try {
    await checkPicture(blob);
    const found = await readSettings(blob);
    if (!found) throw new ApiError("This picture carries no settings: only PNGs that were made here do. To edit it, drop it on the field of the Edit tab.");
    const where = found.pictures > 0 ? "edit" : "draw";
    const remarks = parts[where].restore(found);
    choose(where);
    note(["Settings restored, seed kept", ...remarks].join("; ") + ".");
  } catch (error) {
    showError(error);
  }
}

function listenForDrops() {
  const veil = document.getElementById("dropping");
  const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    veil.hidden = Boolean(event.target.closest?.("[data-drop]"));
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) veil.hidden = true; });
  document.addEventListener("dropped", () => { veil.hidden = true; });
  document.addEventListener("drop", (event) => {
    veil.hidden = true;
    if (!files(event)) return;
    event.preventDefault();
    restoreFrom(event.dataTransfer.files[0]);
  });
  const input = document.getElementById("restore");
  input.addEventListener("change", () => { restoreFrom(input.files[0]); input.value = ""; });
}

async function start() {
  const { data: [card] } = await getJson("v1/models");
  document.getElementById("model").textContent = card.id;
  const shared = { editThis, restoreFrom };
  const panel = (name) => document.getElementById(name);
  parts.draw = setUpDraw(panel("draw"), card, shared);
  parts.edit = setUpEdit(panel("edit"), card, shared);
  setUpAsk(panel("ask"), card);
  setUpCompare(panel("compare"), card, shared);
  parts.live = setUpLive(panel("live"), card, shared);
  document.querySelector("main").inert = false;
  document.body.dataset.ready = "true";
  choose(location.hash.slice(1));
}

/** Starts the page, which stays inert until the model's card has come; if it does not come, the user can try again. */
async function begin() {
  try {
    await start();
  } catch (error) {
    showError(error, { again: begin });
  }
}

choose(location.hash.slice(1));
listenForDrops();
begin();
