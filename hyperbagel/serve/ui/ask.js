// The Ask tab: a conversation about pictures, whose answers are streamed.

import { ApiError, brokeOff, events, jsonBody } from "./api.js";
import { Pictures } from "./files.js";
import { make, ms, runner } from "./page.js";
import { toDataUrl } from "./png.js";

export function setUpAsk(panel, card) {
  const talk = panel.querySelector("[data-talk]");
  const field = (name) => panel.querySelector(`[name=${name}]`);
  const pictures = new Pictures(panel, { most: card.limits.images });
  let messages = [];
  let sent = new Set();  // pictures that are part of the conversation already
  const hint = talk.innerHTML;
  let talks = 0;  // how many conversations were begun, to notice that an answer belongs to an earlier one

  field("drafter").append(...["auto", ...card.drafters.filter((name) => name !== "auto")].map((name) => make("option", { value: name, textContent: name })));
  field("max_tokens").max = card.limits.max_tokens;
  panel.querySelector("form").dataset.enter = "true";  // Enter sends, Shift+Enter breaks the line

  panel.querySelector("[data-new]").addEventListener("click", () => {
    panel.querySelector("[data-cancel]").click();
    talks += 1;
    messages = [];
    sent = new Set();
    talk.innerHTML = hint;
    pictures.set([]);
    field("prompt").focus();
  });

  runner(panel, async (signal) => {
    const question = field("prompt").value.trim();
    if (!question) throw new ApiError("Write a question first.");
    const fresh = pictures.list.filter((blob) => !sent.has(blob));
    const parts = await Promise.all(fresh.map(async (blob) => ({ type: "image_url", image_url: { url: await toDataUrl(blob) } })));
    const asked = { role: "user", content: [...parts, { type: "text", text: question }] };
    const { turn, thought, text, facts } = addTurn(talk, question, fresh.length);
    const asking = talks;
    field("prompt").value = "";
    const body = {
      messages: [...messages, asked], stream: true, drafter: field("drafter").value, think: field("think").checked,
      max_tokens: Number(field("max_tokens").value || 256), temperature: Number(field("temperature").value || 0),
    };
    const began = performance.now();
    let first = null, ended = false;
    try {
      for await (const chunk of events("v1/chat/completions", { ...jsonBody(body), signal })) {
        const [choice] = chunk.choices;
        if (!choice) continue;
        const piece = choice.delta;
        const near = turn.getBoundingClientRect().bottom < innerHeight + 40;  // do not scroll if the user has scrolled elsewhere
        if (first === null && (piece.content || piece.reasoning_content)) first = performance.now() - began;
        thought.textContent += piece.reasoning_content ?? "";
        text.textContent += piece.content ?? "";
        if (choice.finish_reason) facts.textContent = describe(choice, first, performance.now() - began);
        ended ||= Boolean(choice.finish_reason);
        if (near) turn.scrollIntoView({ block: "nearest" });
      }
      if (!ended) throw brokeOff();
      if (asking !== talks) return "";
      messages.push(asked, { role: "assistant", content: text.textContent });
      for (const blob of fresh) sent.add(blob);
      turn.dataset.state = "done";
      return text.textContent;
    } catch (error) {
      turn.dataset.state = error.name === "AbortError" ? "cancelled" : "failed";
      facts.textContent = `${turn.dataset.state}; this question is not part of the conversation`;
      if (asking === talks) field("prompt").value ||= question;
      throw error;
    }
  });
}

/** Shows a question, and below it an empty turn for its answer; returns the answer's elements. */
function addTurn(talk, question, pictures) {
  talk.querySelector(".hint")?.remove();
  const seen = pictures ? `\n[${pictures} picture${pictures > 1 ? "s" : ""}]` : "";
  const thought = make("div", { className: "thought" });
  const text = make("div", { className: "text" });
  const facts = make("p", { className: "timings" });
  const turn = make("div", { className: "turn" }, thought, text, facts);
  turn.dataset.state = "writing";
  talk.append(make("div", { className: "turn user", textContent: question + seen }), turn);
  turn.scrollIntoView({ block: "nearest" });
  return { turn, thought, text, facts };
}

/** The line below an answer: the server's own times, then those seen from the page. first, total: ms since the request. */
function describe({ tokens, tau, drafter, timings, finish_reason: reason }, first, total) {
  const yielded = Math.max(0, tokens - 1 + (reason === "stop")); // the first token comes with the prefill
  const rate = yielded / Math.max(timings.decode, 1e-9);
  const facts = [`${tokens} token${tokens === 1 ? "" : "s"}`, `${rate.toFixed(0)} tokens/s`];
  facts.push(drafter === null ? "no drafter" : tau === null ? "nothing to draft" : `tau ${tau.toFixed(2)} tokens per forward (${drafter})`);
  facts.push(`prefill ${ms(timings.prefill)}`, `decode ${ms(timings.decode)}`);
  if (first !== null) facts.push(`first text after ${ms(first / 1000)}`);
  facts.push(`round trip ${ms(total / 1000)}`);
  if (reason === "length") facts.push("cut off: raise the longest answer");
  return facts.join(" · ");
}
