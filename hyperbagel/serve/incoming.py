"""From request bodies to the pipeline's requests. Whatever can be refused is refused here, before it waits in the queue."""

from __future__ import annotations

import base64
import binascii
import io
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from PIL import Image, UnidentifiedImageError

from hyperbagel.core.errors import InputError
from hyperbagel.data.images import FORMATS, open_image, open_mask
from hyperbagel.data.prompts import THINK_ANSWER
from hyperbagel.pipeline import AskRequest, HyperBagel, ImageRequest, check_mask, latent_grid
from hyperbagel.serve.outgoing import patch_tokens
from hyperbagel.serve.schemas import ApiError, ChatBody, ImageFields, Knobs, Limits, Message, Part, SentPicture

DENOISING = ("student", "steps", "text_scale", "image_scale", "interval", "renorm", "renorm_min", "shift")
PLAN = ("max_think_tokens", "think_temperature", "drafter")
# Formats that clients may send. Not TIFF: its tiles may be far larger than its picture, so a few hundred bytes could unpack to gigabytes.
SENT = tuple(kind for kind in FORMATS if kind != "TIFF")
SYSTEM = ("system", "developer")  # two names for one role
ANSWER = 1024  # tokens of an answer that names no limit. Its room in the cache is made at the start: at 7B 58 MB in bf16, 8 of them 470
DESCRIBE = "Describe the picture."  # what is asked of pictures that come without words: the model has learnt no answers to nothing


class Incoming:
    """Reads requests to one model under one set of limits. names: what the model may be called. Methods raise ApiError or InputError."""

    def __init__(self, model: HyperBagel, names: Sequence[str], limits: Limits) -> None:
        self.model, self.names, self.limits = model, names, limits

    # -- pictures to draw ------------------------------------------------------------------------------------------------------

    def pictures(self, body: ImageFields, files: Sequence[bytes] = (), mask: bytes | None = None) -> list[ImageRequest]:
        """The requests of a generation or an edit, one per picture, with seeds seed, seed + 1, ...

        files: the pictures to edit and mask: its mask, each as the bytes of a file.
        """
        # The part that a mask keeps is copied into the result at the size asked for, so the masked picture must not be shrunk here.
        images = [self.picture(data, f"image {i + 1}", whole=mask is not None and i == 0) for i, data in enumerate(files)]
        return self.drawing(body, images, None if mask is None else self._mask(mask, images[0]))

    def drawing(self, body: ImageFields, images: Sequence[Image.Image] = (), mask: Image.Image | None = None) -> list[ImageRequest]:
        """As `pictures`, from pictures that have been read."""
        self._model_name(body.model)
        return self._spread(ImageRequest(body.prompt, tuple(images), mask=mask, **self._settings(body, body.size)), body)

    def chat_pictures(self, body: ChatBody) -> list[ImageRequest]:
        """The requests of a chat that is answered with pictures. Their inputs are the parts of the last message, in order.

        If that message holds no picture, the latest picture of the conversation comes first, so that "make it blue" edits what was drawn.
        """
        self._model_name(body.model)
        *earlier, last = self._turns(body)
        self._few(len(_pictures(last)))  # earlier ones are not read, so that a conversation may go on as long as its body fits
        inputs = self._items(_sent(last))
        if not _pictures(last):
            before = next(filter(None, map(_pictures, reversed(earlier))), [])
            inputs = [*self._items(before[-1:]), *inputs]
        system = [text for message in body.messages if message.role in SYSTEM if (text := _text(message))]
        prompt = "\n".join(item for item in inputs if isinstance(item, str))
        inputs = [*system, *inputs]
        return self._spread(ImageRequest(prompt, inputs=tuple(inputs), **self._settings(body, body.size)), body)

    def _spread(self, request: ImageRequest, body: ImageFields | ChatBody) -> list[ImageRequest]:
        """A request repeated for each of body.n pictures, with consecutive seeds."""
        texts = [item for item in request.items() if isinstance(item, str)]
        if not any(text.strip() for text in texts):
            raise ApiError(400, "got an empty prompt, expected some text", param="prompt")
        request.denoising()  # refuses settings that contradict each other
        first = _first_seed(body)
        return [replace(request, seed=first + i) for i in range(self._count(body.n))]

    def _settings(self, knobs: Knobs, size: str | None) -> dict[str, Any]:
        """The arguments of an `ImageRequest` that a body gives, checked against the limits."""
        limits = self.limits
        if knobs.steps is not None and knobs.steps > limits.steps:
            raise ApiError(400, f"got {knobs.steps} steps, expected at most {limits.steps}", param="steps")
        if knobs.max_think_tokens is not None and knobs.max_think_tokens > limits.max_tokens:
            raise ApiError(
                400, f"got max_think_tokens {knobs.max_think_tokens}, expected at most {limits.max_tokens}", param="max_think_tokens"
            )
        # Names only: folders would let a client read the server's disk.
        students = self.model.students.names()
        if knobs.student not in (None, "none", *students):
            raise ApiError(400, f"got student {knobs.student!r}, expected one of {', '.join([*students, 'none'])}", param="student")
        drafters = self.model.drafters.names()
        if knobs.drafter not in (None, *drafters):
            raise ApiError(400, f"got drafter {knobs.drafter!r}, expected one of {', '.join(drafters)}", param="drafter")
        given = {name: value for name in (*DENOISING, *PLAN) if (value := getattr(knobs, name)) is not None}
        if limits.max_tokens < ImageRequest.LONGEST_PLAN:
            given.setdefault("max_think_tokens", limits.max_tokens)
        return given | {"think": bool(knobs.think), "size": self._size(size)}

    def _size(self, size: str | None) -> tuple[int, int] | None:
        """ "640x480" as (height, width), checked against the model; None for "auto"."""
        if size is None or size == "auto":
            return None
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
        if match is None:
            raise ApiError(400, f"got size {size!r}, expected WIDTHxHEIGHT such as 512x512, or auto", param="size")
        both = int(match[2]), int(match[1])
        try:
            latent_grid(self.model.parts.model.config, both)
        except InputError as error:
            raise ApiError(400, str(error), param="size") from error
        return both

    # -- questions -------------------------------------------------------------------------------------------------------------

    def questions(self, body: ChatBody) -> list[AskRequest]:
        """The requests of a chat that is answered with text. The model reads all pictures first, then question, answer, ..., question."""
        self._model_name(body.model)
        self._settings(body, body.size)  # an answer needs none, but wrong ones are an error all the same
        asked = self._turns(body)
        pictures = [part for message in asked for part in _pictures(message)]
        self._few(len(pictures))  # before any is unpacked
        images = [item for item in self._items(pictures) if isinstance(item, Image.Image)]
        system = "\n".join(text for message in body.messages if message.role in SYSTEM if (text := _text(message)))
        turns, question = _pairs(system, asked)
        if not question.strip():
            raise ApiError(400, "got an empty question, expected some text in the last message", param="messages")
        tokens = body.max_completion_tokens or body.max_tokens
        if tokens is not None and tokens > self.limits.max_tokens:
            raise ApiError(400, f"got max_tokens {tokens}, expected at most {self.limits.max_tokens}", param="max_tokens")
        given: dict[str, Any] = {name: value for name in ("temperature", "top_p", "stop") if (value := getattr(body, name)) is not None}
        request = AskRequest(question, tuple(images), think=bool(body.think), turns=turns, drafter=body.drafter, **given)
        first, longest = _first_seed(body), tokens or self._usual_length(request)
        return [replace(request, seed=first + i, max_tokens=longest) for i in range(self._count(body.n))]

    def _usual_length(self, request: AskRequest) -> int:
        """Tokens that an answer may have where a question names no limit: ANSWER, the server's limit, or what the context leaves, as a
        power of two then, since answers of equal limits share a batch, and drafts need some room behind them."""
        parts = self.model.parts
        texts = [*[THINK_ANSWER] * request.think, *chain(*request.turns), request.question]
        left = parts.model.config.llm.max_position_embeddings - 1  # im_start
        left -= sum(patch_tokens(self.model, image) for image in request.images)
        for text in texts:
            left -= len(parts.tokenizer.encode(text)) + 2 if left > 0 else 0  # what is too long anyway need not be read to its end
        return min(ANSWER, self.limits.max_tokens, 1 << (max(left, 1).bit_length() - 1))

    def _turns(self, body: ChatBody) -> list[Message]:
        """The messages of user and assistant, the user's last."""
        turns = [message for message in body.messages if message.role in ("user", "assistant")]
        if not turns or turns[-1].role != "user":
            raise ApiError(400, "got a conversation that ends with another message, expected the user's last", param="messages")
        if any(_pictures(message) for message in body.messages if message.role in SYSTEM):
            raise ApiError(400, "got a picture in a system message, expected text alone; put it into a user's message", param="messages")
        return turns

    def _items(self, parts: Sequence[str | Part | SentPicture]) -> list[str | Image.Image]:
        """Texts and pictures in order, the pictures unpacked."""
        items: list[str | Image.Image] = []
        for part in parts:
            if isinstance(part, str):
                items.append(part)
            elif part.image_url is None:
                raise ApiError(400, "got an image_url part without image_url, expected {'url': 'data:...'}", param="messages")
            else:
                items.append(self.picture(data_url(part.image_url.url), "image_url"))
        return items

    # -- limits ----------------------------------------------------------------------------------------------------------------

    def picture(self, data: bytes, name: str, *, whole: bool = False) -> Image.Image:
        """The bytes of a file as an RGB picture. It is resized as the model reads it unless `whole`. name: for errors."""
        self._check_file(data, name)
        image = open_image(data, name)
        return image if whole else self._small(image)

    def _mask(self, data: bytes, source: Image.Image) -> Image.Image:
        """The bytes of a file as a mask, which must have the size of `source`."""
        self._check_file(data, "mask")
        mask = open_mask(data, "mask")
        try:
            check_mask(mask, source)
        except InputError as error:
            raise ApiError(400, str(error), param="mask") from error
        return mask

    def _check_file(self, data: bytes, name: str) -> None:
        """Refuses a file by the format and size in its first bytes, before anything is unpacked. File names and content types are not
        trusted."""
        param = "mask" if name == "mask" else "image"
        try:
            width, height = Image.open(io.BytesIO(data), formats=SENT).size
        except UnidentifiedImageError as error:
            raise ApiError(400, f"{name}: got a file that is no picture, expected PNG, JPEG, WebP, GIF or BMP", param=param) from error
        except Image.DecompressionBombError as error:
            told = f"{name}: got far too many pixels, expected at most {self.limits.image_pixels}; make it smaller"
            raise ApiError(400, told, param=param, code="image_too_large") from error
        except Exception as error:  # Pillow raises almost anything for malformed headers
            raise ApiError(400, f"{name}: got a damaged picture, expected a whole file", param=param) from error
        if width * height > self.limits.image_pixels:
            told = f"{name}: got {width}x{height} pixels, expected at most {self.limits.image_pixels}; make it smaller"
            raise ApiError(400, told, param=param, code="image_too_large")

    def _small(self, image: Image.Image) -> Image.Image:
        """The picture as the pipeline would resize it first, so that large uploads do not pile up in the queue's memory.

        It is left alone if the pipeline would resize the result once more, which would give another picture.
        """
        rule = self.model.parts.vae_transform
        small = rule.size(image.width, image.height)
        return rule.resize(image) if rule.size(*small) == small else image

    def _few(self, pictures: int) -> None:
        if pictures > self.limits.images:
            raise ApiError(400, f"got {pictures} pictures, expected at most {self.limits.images}", param="messages")

    def _count(self, n: int | None) -> int:
        if n is not None and n > self.limits.n:
            raise ApiError(400, f"got n {n}, expected at most {self.limits.n}", param="n")
        return n or 1

    def _model_name(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            told = f"got model {name!r}, expected {', '.join(self.names)}"
            raise ApiError(404, told, param="model", code="model_not_found")


def _first_seed(knobs: Knobs) -> int:
    return secrets.randbits(31) if knobs.seed is None else knobs.seed


def _sent(message: Message) -> list[str | Part | SentPicture]:
    """The texts of a message that are not empty, and its pictures, still packed; in order."""
    parts: list[Any] = [message.content] if isinstance(message.content, str) else [*(message.content or ())]
    found = [part.text if isinstance(part, Part) and part.type == "text" else part for part in (*parts, *(message.images or ()))]
    return [part for part in found if part]


def _pictures(message: Message) -> list[Part | SentPicture]:
    """The pictures of a message, still packed."""
    return [part for part in _sent(message) if not isinstance(part, str)]


def _text(message: Message) -> str:
    """The texts of a message, joined by line ends."""
    return "\n".join(part for part in _sent(message) if isinstance(part, str))


def _pairs(system: str, messages: Sequence[Message]) -> tuple[tuple[tuple[str, str], ...], str]:
    """The texts of a conversation as (earlier questions with their answers, last question).

    Consecutive messages of one role are joined by line ends. The system's text begins the first question. Pictures without words are asked
    DESCRIBE.
    """
    turns: list[tuple[str, str]] = []
    asked: list[Message] = []  # the user's messages of one turn
    begins, answer = system, ""
    for message in messages:
        if message.role == "assistant":
            answer = "\n".join(filter(None, (answer, _text(message))))
            continue
        if answer:  # a user's message after an answer: the pair before it is complete
            turns.append((_question(begins, asked), answer))
            asked, begins, answer = [], "", ""
        asked.append(message)
    return tuple(turns), _question(begins, asked)


def _question(system: str, messages: Sequence[Message]) -> str:
    """The words of one turn of the user."""
    words = [text for message in messages if (text := _text(message)).strip()]
    return "\n".join(filter(None, (system, *(words or [DESCRIBE] * any(map(_pictures, messages))))))


def data_url(url: str) -> bytes:
    """The bytes of a base64 data: URL. Other URLs are refused: fetching them would let clients reach what only the server can reach."""
    head, comma, payload = url.partition(",")
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        raise ApiError(400, f"got the address {url[:40]!r}, expected a URL of the form data:image/png;base64,...", param="image_url")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, "got a data: URL whose base64 is damaged, expected whole groups of four characters", param="image_url"
        ) from error
