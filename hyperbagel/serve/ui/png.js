// Pictures as bytes: base64, data URLs, and the settings that our PNGs carry in an iTXt chunk.

const KEYWORD = "hyperbagel";

export function fromBase64(text, type = "image/png") {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Blob([bytes], { type });
}

export function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The digits of "seed" in a JSON text: read from the text, because a seed may exceed what a JavaScript number holds exactly. */
export const seedIn = (text) => /"seed": ?(\d+)/.exec(text)?.[1];

/** The settings inside a PNG, with the seed as a string; null if there are none. */
export async function readSettings(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(bytes.buffer);
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47 || view.getUint32(4) !== 0x0d0a1a0a) return null;
  const latin = new TextDecoder("latin1");
  for (let at = 8; at + 8 <= bytes.length;) {
    const length = view.getUint32(at);
    const kind = latin.decode(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (kind === "iTXt") {
      // keyword, 0, compression flag, compression method, language, 0, translated keyword, 0, text
      const zero = data.indexOf(0);
      if (latin.decode(data.subarray(0, zero)) === KEYWORD && data[zero + 1] === 0) {
        const language = data.indexOf(0, zero + 3);
        const translated = data.indexOf(0, language + 1);
        return parse(new TextDecoder().decode(data.subarray(translated + 1)));
      }
    }
    at += 12 + length;
  }
  return null;
}

function parse(text) {
  try {
    const settings = JSON.parse(text);
    return typeof settings === "object" && settings !== null ? { ...settings, seed: seedIn(text) ?? "0" } : null;
  } catch {
    return null;
  }
}
