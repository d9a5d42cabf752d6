// Talking to the server: the key, errors, server-sent events. Paths are relative to the page, so that a proxy may serve it below any path.

/** An error with a message for the user. status: of the HTTP answer, 0 without one. code: OpenAI's. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

const STORE = "hyperbagel-key";
let kept = "";  // the key, for a browser that forbids storage

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
    // storage is forbidden: after a reload the key is asked for again
  }
}

export const address = (path) => new URL(path, document.baseURI);

let asking = null;

/** Asks the user for the key, once even if several requests need it. Resolves to whether one was given. */
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

/** A failed response as an ApiError. */
async function refusal(response) {
  const body = await response.json().catch(() => null);
  const told = body?.error;
  if (response.status === 429) {
    const wait = response.headers.get("retry-after");
    return new ApiError(`The server is busy.${wait ? ` Try again in ${wait} s.` : ""}`, 429, told?.code);
  }
  return new ApiError(told?.message ?? `The server answered with status ${response.status} and gave no reason.`, response.status, told?.code);
}

/** Like fetch, but sends the key, asks the user for it if the server wants one, and throws ApiError for a failed response. */
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
    // If the key has changed meanwhile, another request has asked for it: try again with the new one.
    if (getKey() === used && !(await askKey())) throw new ApiError("This server needs an API key.", 401, error.code);
  }
}

export const getJson = async (path) => (await call(path)).json();

export const jsonBody = (body) => ({ method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

/** What to throw when an answer ends too early. */
export const brokeOff = () => new ApiError("The connection broke off in the middle of the answer.");

/** Yields the data of each server-sent event, up to [DONE] or the end. Throws ApiError for an event that reports an error. */
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
    throw brokeOff();
  } finally {
    reader.cancel().catch(() => {});
  }
}
