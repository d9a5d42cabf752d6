// Talking to the server: the key, errors, server-sent events. Paths are relative to the page, so that it also works below another path.

export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

const STORE = "hyperbagel-key";
let kept = "";  // the key of a page for which the browser stores nothing

export function getKey() {
  try {
    return sessionStorage.getItem(STORE) ?? "";
  } catch {
    return kept;
  }
}

function keepKey(key) {
  kept = key;
  try {
    sessionStorage.setItem(STORE, key);
  } catch {
    // storage is forbidden: the key is asked for again on the next page
  }
}

export const address = (path) => new URL(path, document.baseURI);

let asking = null;

/** Asks for the key, once however many requests need it. Resolves to whether one was given. */
export function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key");
    const input = dialog.querySelector("input");
    input.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "ok";
      if (given) keepKey(input.value.trim());
      resolve(given);
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

/** The error that a refused answer holds. */
async function refusal(response) {
  const body = await response.json().catch(() => null);
  const told = body?.error;
  if (response.status === 429) {
    const wait = response.headers.get("retry-after");
    return new ApiError(`The server is busy.${wait ? ` Try again in ${wait} s.` : ""}`, 429, told?.code);
  }
  return new ApiError(told?.message ?? `The server answered ${response.status} without saying why.`, response.status, told?.code);
}

/** A fetch that sends the key, asks for it if it is missing, and throws ApiError. */
export async function call(path, options = {}) {
  for (;;) {
    const used = getKey();
    const headers = { ...options.headers, ...(used && { authorization: `Bearer ${used}` }) };
    let response;
    try {
      response = await fetch(address(path), { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response;
    const error = await refusal(response);
    if (response.status !== 401) throw error;
    if (getKey() === used && !(await askKey())) throw new ApiError("This server needs an API key.", 401, error.code);
  }
}

export const getJson = async (path) => (await call(path)).json();

export const jsonBody = (body) => ({ method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

/** The data of each server-sent event, up to [DONE] or the end. An event with an error throws it. */
export async function* events(path, options) {
  const response = await call(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const pieces = (rest + value).split("\n\n");
      rest = pieces.pop();
      for (const piece of pieces) {
        const text = piece.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (text === "[DONE]") return;
        if (!text) continue;
        const data = JSON.parse(text);
        if (data.error) throw new ApiError(data.error.message, 500, data.error.code);
        yield data;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke off in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
