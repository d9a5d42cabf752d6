"""From results to OpenAI's answers: JSON objects, server-sent events, encoded pictures."""

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
from hyperbagel.pipeline import HyperBagel, ImageRequest, ImageResult, TextResult
from hyperbagel.serve.schemas import ApiError, ImageFields


def encode(image: Image.Image, kind: str = "png", compression: int | None = None, settings: dict[str, Any] | None = None) -> str:
    """base64 of a picture's file."""
    return base64.b64encode(file_of(image, kind, compression, settings)).decode()


def file_of(
    image: Image.Image, kind: str = "png", compression: int | None = None, settings: dict[str, Any] | None = None, level: int = 6
) -> bytes:
    """A picture's file. A PNG carries `settings`, as those that the command line writes; level: how hard it is packed, 0 to 9."""
    buffer = io.BytesIO()
    if kind == "png":
        info = PngInfo()
        if settings is not None:
            info.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False, sort_keys=True))
        image.save(buffer, "PNG", pnginfo=info, compress_level=level)
    else:
        image.save(buffer, kind.upper(), quality=90 if compression is None else compression)
    return buffer.getvalue()


def sse(data: dict[str, Any] | str, event: str | None = None) -> str:
    """One server-sent event."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def error_event(error: ApiError) -> str:
    return sse(error.body(), "error")


# -- images ------------------------------------------------------------------------------------------------------------------------


def image_item(body: ImageFields, result: ImageResult) -> dict[str, Any]:
    """One entry of `data`. seed, nfe and timings are ours."""
    kind = body.output_format or "png"
    item: dict[str, Any] = {} if result.thinking is None else {"revised_prompt": result.thinking}
    encoded = encode(result.image, kind, body.output_compression, result.settings)
    item |= {"url": f"data:image/{kind};base64,{encoded}"} if body.response_format == "url" else {"b64_json": encoded}
    return item | {"seed": result.seed, "nfe": result.nfe, "timings": result.timings}


def about(body: ImageFields, size: tuple[int, int]) -> dict[str, Any]:
    """Facts that OpenAI's image answers repeat."""
    size_text = f"{size[0]}x{size[1]}"
    return {"size": size_text, "quality": "high", "background": "opaque", "output_format": body.output_format or "png"}


def images_answer(body: ImageFields, results: Sequence[ImageResult], usage: dict[str, Any]) -> dict[str, Any]:
    data = [image_item(body, result) for result in results]
    return {"created": int(time.time()), "data": data, "usage": usage, **about(body, results[0].image.size)}


def image_usage(model: HyperBagel, requests: Sequence[ImageRequest], results: Sequence[ImageResult]) -> dict[str, Any]:
    """Tokens of the contexts and of the latents, summed over the pictures."""
    text = images = output = 0
    parts = model.parts
    patch, stride = parts.model.config.vit.patch_size, parts.model.config.latent_stride
    for request, result in zip(requests, results, strict=True):
        for item in request.items():
            if isinstance(item, str):
                text += len(parts.tokenizer.encode(item)) + 2
                continue
            width, height = parts.vae_transform.size(item.width, item.height)
            seen = parts.vit_transform.size(width, height)
            images += (width // stride) * (height // stride) + (seen[0] // patch) * (seen[1] // patch) + 4
        output += (result.image.width // stride) * (result.image.height // stride)
    details = {"text_tokens": text, "image_tokens": images}
    return {"input_tokens": text + images, "input_tokens_details": details, "output_tokens": output, "total_tokens": text + images + output}


# -- chat --------------------------------------------------------------------------------------------------------------------------


def chat_usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def image_part(result: ImageResult) -> dict[str, Any]:
    url = "data:image/png;base64," + encode(result.image, settings=result.settings)
    return {"type": "image_url", "image_url": {"url": url}, "seed": result.seed, "nfe": result.nfe}


def chat_message(result: TextResult | ImageResult, think: bool) -> dict[str, Any]:
    """An assistant's message: content is always a string; thinking stands beside it."""
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
    """What we say beside an answer: its time, and for text its tokens, who drafted, and that one's acceptance (tau); null without one."""
    if isinstance(result, ImageResult):
        return {"timings": result.timings}
    return {"timings": result.timings, "tokens": result.tokens, "drafter": result.drafter, "tau": result.tau}


class ThinkSplitter:
    """`<think> a </think> b`, as it comes in pieces, into ("reasoning_content", "a"), ("content", "b"), without the blanks around them.

    Text that does not begin with <think> is content. A thought that was cut off by max_tokens stays a thought.
    """

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, think: bool) -> None:
        self.name = "" if think else "content"  # "": it is not known yet which
        self.rest, self.fresh = "", True  # text held back; whether nothing of the present part was given out

    def push(self, text: str) -> list[tuple[str, str]]:
        self.rest += text
        out: list[tuple[str, str]] = []
        if not self.name:
            begin = self.rest.lstrip()
            if begin.startswith(self.OPEN):
                self.name, self.rest = "reasoning_content", begin[len(self.OPEN) :]
            elif self.OPEN.startswith(begin):
                return out
            else:
                self.name = "content"
        if self.name == "reasoning_content" and self.CLOSE in self.rest:
            thought, _, self.rest = self.rest.partition(self.CLOSE)
            out += self._give(thought.rstrip())
            self.name, self.fresh = "content", True
        # Blanks at the end may turn out to be the text's end, and the beginning of </think> to be just that.
        mark = self.CLOSE if self.name == "reasoning_content" else ""
        keep = next((i for i in range(len(self.rest)) if mark.startswith(self.rest[i:].strip())), len(self.rest))
        ready, self.rest = self.rest[:keep], self.rest[keep:]
        return out + self._give(ready)

    def finish(self) -> list[tuple[str, str]]:
        """What was held back, at the end of the text."""
        self.name = self.name or "content"
        ready, self.rest = self.rest.rstrip(), ""
        return self._give(ready)

    def _give(self, text: str) -> list[tuple[str, str]]:
        text = text.lstrip() if self.fresh else text
        if not text:
            return []
        self.fresh = False
        return [(self.name, text)]
