"""From the pipeline's results to OpenAI's answers: JSON objects, server-sent events, encoded pictures."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hyperbagel.data.images import SETTINGS_KEY
from hyperbagel.data.prompts import CLOSE, OPEN
from hyperbagel.pipeline import HyperBagel, ImageRequest, ImageResult, TextResult
from hyperbagel.serve.schemas import ApiError, ImageFields


def encode(image: Image.Image, kind: str = "png", compression: int | None = None, settings: dict[str, Any] | None = None) -> str:
    """A picture's file as base64; arguments as of `file_of`."""
    return base64.b64encode(file_of(image, kind, compression, settings)).decode()


def file_of(
    image: Image.Image, kind: str = "png", compression: int | None = None, settings: dict[str, Any] | None = None, level: int = 6
) -> bytes:
    """The bytes of a picture's file.

    kind: png, jpeg or webp. compression: quality of jpeg and webp, 0 to 100; None: 90. settings: written into a PNG, as the command line
    does. level: of a PNG's compression, 0 to 9.
    """
    buffer = io.BytesIO()
    if kind == "png":
        info = PngInfo()
        if settings is not None:
            info.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True))
        image.save(buffer, "PNG", pnginfo=info, compress_level=level)
    else:
        image.save(buffer, kind.upper(), quality=90 if compression is None else compression)
    return buffer.getvalue()


PING = ": ping\n\n"  # a comment in a stream of server-sent events, which clients skip: it keeps proxies from closing the connection


def sse(data: dict[str, Any] | str, event: str | None = None) -> str:
    """One server-sent event."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def error_event(error: ApiError) -> str:
    return sse(error.body(), "error")


# -- images ------------------------------------------------------------------------------------------------------------------------


def image_item(body: ImageFields, result: ImageResult) -> dict[str, Any]:
    """One entry of `data` in an answer. seed, nfe, timings, and drafter and tau of a plan are fields of our own."""
    kind = body.output_format or "png"
    item: dict[str, Any] = {} if result.thinking is None else {"revised_prompt": result.thinking}
    encoded = encode(result.image, kind, body.output_compression, result.settings)
    item |= {"url": f"data:image/{kind};base64,{encoded}"} if body.response_format == "url" else {"b64_json": encoded}
    return item | {"seed": result.seed, "nfe": result.nfe, "timings": result.timings, "drafter": result.drafter, "tau": result.tau}


def about(body: ImageFields, size: tuple[int, int]) -> dict[str, Any]:
    """The facts about a picture that OpenAI's answers state. size: (width, height)."""
    size_text = f"{size[0]}x{size[1]}"
    return {"size": size_text, "quality": "high", "background": "opaque", "output_format": body.output_format or "png"}


def images_answer(body: ImageFields, results: Sequence[ImageResult], usage: dict[str, Any]) -> dict[str, Any]:
    data = [image_item(body, result) for result in results]
    return {"created": int(time.time()), "data": data, "usage": usage, **about(body, results[0].image.size)}


def image_usage(model: HyperBagel, requests: Sequence[ImageRequest], results: Sequence[ImageResult]) -> dict[str, Any]:
    """Tokens read (texts, and pictures as latents and ViT patches) and latent tokens drawn, summed over the requests."""
    text = images = output = 0
    parts = model.parts
    stride = parts.model.config.latent_stride
    for request, result in zip(requests, results, strict=True):
        for item in request.items():
            if isinstance(item, str):
                text += len(parts.tokenizer.encode(item)) + 2
                continue
            width, height = parts.vae_transform.size(item.width, item.height)
            images += (width // stride) * (height // stride) + 2 + patch_tokens(model, item)
        output += (result.image.width // stride) * (result.image.height // stride)
    details = {"text_tokens": text, "image_tokens": images}
    return {"input_tokens": text + images, "input_tokens_details": details, "output_tokens": output, "total_tokens": text + images + output}


def patch_tokens(model: HyperBagel, image: Image.Image) -> int:
    """Tokens of a picture as ViT patches, between its two markers."""
    parts = model.parts
    width, height = parts.vit_transform.size(*parts.vae_transform.size(image.width, image.height))
    patch = parts.model.config.vit.patch_size
    return (width // patch) * (height // patch) + 2


# -- chat --------------------------------------------------------------------------------------------------------------------------


def chat_usage(prompt: int, completion: int, reused: int = 0) -> dict[str, Any]:
    """reused: tokens of the prompt that need not be read again."""
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return usage | {"prompt_tokens_details": {"cached_tokens": reused}}


def image_part(result: ImageResult) -> dict[str, Any]:
    url = "data:image/png;base64," + encode(result.image, settings=result.settings)
    return {"type": "image_url", "image_url": {"url": url}, "seed": result.seed, "nfe": result.nfe}


def chat_message(result: TextResult | ImageResult, think: bool) -> dict[str, Any]:
    """An assistant's message: content is always a string, thinking has a field of its own. think: the answer may begin with a thought."""
    if isinstance(result, ImageResult):
        thinking = {} if result.thinking is None else {"reasoning_content": result.thinking}
        return {"role": "assistant", "content": "", **thinking, "images": [image_part(result)]}
    if result.thinking is not None:
        return {"role": "assistant", "content": result.text, "reasoning_content": result.thinking}
    split = ThinkSplitter(think)
    pieces = {"content": ""}
    for name, text in [*split.push(result.text), *split.finish()]:
        pieces[name] = pieces.get(name, "") + text
    return {"role": "assistant", **pieces}


def choice_facts(result: TextResult | ImageResult) -> dict[str, Any]:
    """Our own fields beside an answer: timings, the drafter (null without one) and its acceptance tau (null also where the prefill gave the
    whole answer); for text also its tokens and the stop text that ended it (null without one). A picture's drafter drafted its plan."""
    tokens = {"tokens": result.tokens, "stop_reason": result.stopped_at} if isinstance(result, TextResult) else {}
    return {"timings": result.timings, **tokens, "drafter": result.drafter, "tau": result.tau}


class ThinkSplitter:
    """Splits the text `<think> a </think> b`, which comes in pieces, into ("reasoning_content", "a") and ("content", "b"), both stripped.

    Text that does not begin with <think> is content. A thought that max_tokens cut off stays a thought. think: without it all is content.
    """

    def __init__(self, think: bool) -> None:
        self.name = "" if think else "content"  # of the current part; "": not known yet
        self.rest = ""  # text held back
        self.fresh = True  # nothing of the current part has been given out

    def push(self, text: str) -> list[tuple[str, str]]:
        """Takes the next piece; returns what is certain by now, as (field of the message, text)."""
        self.rest += text
        out: list[tuple[str, str]] = []
        if not self.name:
            begin = self.rest.lstrip()
            if begin.startswith(OPEN):
                self.name, self.rest = "reasoning_content", begin[len(OPEN) :]
            elif OPEN.startswith(begin):
                return out
            else:
                self.name = "content"
        if self.name == "reasoning_content" and CLOSE in self.rest:
            thought, _, self.rest = self.rest.partition(CLOSE)
            out += self._give(thought.rstrip())
            self.name, self.fresh = "content", True
        # Held back: trailing blanks, which are dropped if the part ends there, and what may be the beginning of </think>.
        mark = CLOSE if self.name == "reasoning_content" else ""
        keep = next((i for i in range(len(self.rest)) if mark.startswith(self.rest[i:].strip())), len(self.rest))
        ready, self.rest = self.rest[:keep], self.rest[keep:]
        return out + self._give(ready)

    def finish(self) -> list[tuple[str, str]]:
        """What was held back, once the text has ended."""
        self.name = self.name or "content"
        ready, self.rest = self.rest.rstrip(), ""
        return self._give(ready)

    def _give(self, text: str) -> list[tuple[str, str]]:
        text = text.lstrip() if self.fresh else text
        if not text:
            return []
        self.fresh = False
        return [(self.name, text)]
