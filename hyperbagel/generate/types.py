"""What callers ask for and what they get. The defaults of the whole program live here and nowhere else."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from PIL.Image import Image

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.core.values import interval_of, number, seed_of, size_of, whole
from hyperbagel.data.images import as_mask, as_picture
from hyperbagel.flow.guidance import RENORMS, Renorm
from hyperbagel.model.config import BagelOptions
from hyperbagel.model.student import Sampler

MAX_STEPS = 10_000  # a schedule is made at once, as a whole: a typo must not fill the memory


@dataclass(frozen=True)
class Denoising:
    """How latents are denoised. `num_steps` counts updates (BAGEL's num_timesteps is one more)."""

    num_steps: int = 50
    text_scale: float = 4.0
    image_scale: float = 1.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: Renorm = "global"
    renorm_min: float = 0.0
    shift: float = 3.0
    student: str | None = None  # denoises in the model's place: "6", "1" or a folder; scales are then its inputs, without branches

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise InputError(f"got {self.num_steps} steps, expected 1 to {MAX_STEPS}; 50 is usual")
        if self.renorm not in RENORMS:
            raise InputError(f"got renorm {self.renorm!r}, expected one of {', '.join(RENORMS)}")
        if not (0 <= self.interval[0] <= self.interval[1] <= 1):
            raise InputError(f"got guidance interval {self.interval}, expected two times with 0 <= LO <= HI <= 1")
        if not 0 <= self.renorm_min <= 1:
            raise InputError(f"got renorm_min {self.renorm_min}, expected 0 to 1")
        if not 1e-3 <= self.shift < 1e3:  # below it, times of a schedule coincide
            raise InputError(f"got shift {self.shift}, expected 0.001 to 1000; 3 is usual")
        for name in ("text_scale", "image_scale"):
            value = getattr(self, name)
            if not 0 < value < 1e3:
                raise InputError(f"got {name} {value}, expected a positive number (1 is neutral)")


TEXT_TO_IMAGE = Denoising()
EDIT = Denoising(image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel")
# The teacher as the paper counts it: 100 evaluations a picture, 132 = 50 + 2 * 41 an edit. Students are made from it and compared with it.
PAPER_TEXT_TO_IMAGE = replace(TEXT_TO_IMAGE, interval=(0.0, 1.0))
PAPER_EDIT = replace(EDIT, image_scale=1.5, interval=(0.4, 1.0))


_REQUEST_NAMES = {"num_steps": "steps"}  # fields of Denoising that ImageRequest calls otherwise


@dataclass(frozen=True)
class ImageRequest:
    """A picture to draw (no images) or to edit. Settings left None take the defaults of the kind (TEXT_TO_IMAGE, EDIT).

    `inputs`, if given, is the interleaved form: texts and images in any order, in place of `images` and `prompt`; text guidance drops
    the last text.
    """

    prompt: str = ""
    images: tuple[Image, ...] = ()
    seed: int = 0
    size: tuple[int, int] | None = None  # (height, width), or a text "WIDTHxHEIGHT"; None: the last image's, or the model's own
    think: bool = False
    max_think_tokens: int | None = None  # longest plan; None: LONGEST_PLAN, or what the context has left
    think_temperature: float | None = None  # of the plan; None: 0, greedy. Above it another seed gives another plan too
    steps: int | None = None
    text_scale: float | None = None
    image_scale: float | None = None
    interval: tuple[float, float] | None = None
    renorm: Renorm | None = None
    renorm_min: float | None = None
    shift: float | None = None
    inputs: tuple[str | Image, ...] | None = None
    student: str | None = None  # "6", "1" (evaluations) or a student folder; None: the model itself
    mask: Image | None = None  # of the first picture's size, 255 where it may change (generate.mask); None: everywhere
    # Who drafts the plan: as in AskRequest. None: auto in fp32 if drafters came with the model; else none, since in a coarser type a near
    # tie may fall otherwise, and a seed would give another picture.
    drafter: str | None = None

    LONGEST_PLAN: ClassVar[int] = 1024  # the longest of BAGEL's own app

    def __post_init__(self) -> None:
        """Turns numbers, sizes and intervals, as callers give them, into their own types. Raises InputError for what is none."""
        check_text("prompt", self.prompt, "generate_batch")
        take: dict[str, Callable[[Any], Any]] = {"seed": seed_of, "size": size_of, "interval": interval_of}
        take |= {name: partial(whole, name) for name in ("steps", "max_think_tokens")}
        take |= {name: partial(number, name) for name in ("text_scale", "image_scale", "renorm_min", "shift", "think_temperature")}
        for name, typed in take.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, typed(value))
        if self.think and self.max_think_tokens is not None and self.max_think_tokens < 1:
            raise InputError(f"got max_think_tokens {self.max_think_tokens}, expected at least 1")
        check_temperature("think_temperature", self.think_temperature or 0.0)

    def items(self) -> tuple[str | Image, ...]:
        """Images, then the text; or the interleaved inputs."""
        return (*self.images, self.prompt) if self.inputs is None else self.inputs

    @property
    def sampled(self) -> bool:
        """Whether its plan is drawn."""
        return (self.think_temperature or 0.0) > 0

    @property
    def is_edit(self) -> bool:
        return any(isinstance(item, Image) for item in self.items())

    def with_defaults(self, options: BagelOptions) -> ImageRequest:
        """The same request with the model's own guidance (`bagel_config.json`) where it sets none."""
        own = options.edit if self.is_edit else options.text_to_image
        return replace(self, **{name: value for name, value in own if getattr(self, name) is None})

    def denoising(self) -> Denoising:
        """The settings with the defaults of the request's kind filled in. Raises InputError for values out of range."""
        base = EDIT if self.is_edit else TEXT_TO_IMAGE
        own = {name: getattr(self, _REQUEST_NAMES.get(name, name)) for name in asdict(base)}
        return replace(base, **{name: value for name, value in own.items() if value is not None})


def asked_for(request: ImageRequest) -> dict[str, Any]:
    """What a request held besides prompt, seed and sampler, for the picture's metadata: enough to make the same request again."""
    items = request.items()
    found: dict[str, Any] = {"pictures": sum(not isinstance(item, str) for item in items), "masked": request.mask is not None}
    if request.inputs is not None:
        found["inputs"] = [item if isinstance(item, str) else "<picture>" for item in items]
    if request.think:
        names = ("max_think_tokens", "think_temperature", "drafter")
        found |= {name: value for name in names if (value := getattr(request, name)) is not None}
    return found


def with_sampler(request: ImageRequest, sampler: Sampler, *, warn: bool = True) -> Denoising:
    """The settings of a request to a student, or to a model with one merged into it: what it leaves out comes from the sampler.

    With `warn`, a value that the student was not made for, or one that it ignores, is a Notice.
    """
    who = "this model" if request.student is None else f"student {request.student}"
    settings = request.denoising()
    usual = (sampler.edit_text_scale, sampler.edit_image_scale) if request.is_edit else (sampler.text_scale, sampler.image_scale)
    scales = {"text_scale": usual[0], "image_scale": usual[1]}
    made: dict[str, Any] = {"num_steps": sampler.nfe, "shift": sampler.shift, **scales}
    for name, own in made.items():
        asked = getattr(request, _REQUEST_NAMES.get(name, name))
        if asked is None:
            continue
        low, high = {"text_scale": sampler.text_range, "image_scale": sampler.image_range}.get(name, (own, own))
        if warn and not low <= asked <= high:
            told = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            warnings.warn(f"{who}: got {name} {asked:g}, it was made for {told}", Notice, stacklevel=3)
        made[name] = asked
    ignored = [name for name in ("interval", "renorm", "renorm_min") if getattr(request, name) is not None]
    if warn and ignored:
        warnings.warn(f"{who}: {', '.join(ignored)} ignored, its guidance is inside", Notice, stacklevel=3)
    return replace(settings, **made)


@dataclass(frozen=True)
class AskRequest:
    """A question about any number of images. `turns` are earlier (question, answer) pairs about the same images."""

    question: str
    images: tuple[Image, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    seed: int = 0
    think: bool = False
    turns: tuple[tuple[str, str], ...] = ()
    # The drafter: "auto" (the fastest here), "lookup", the name of one that came with the model, a folder, or "none". None: auto if some
    # came with the model, but none above temperature 0 where a seed would not repeat its answer (in bf16, or where drafts are drawn).
    drafter: str | None = None
    top_p: float = 1.0  # above temperature 0, only the likeliest tokens that together have this probability are drawn
    stop: tuple[str, ...] = ()  # texts, or one text, before which the answer ends; a thought may hold them

    def __post_init__(self) -> None:
        """Turns numbers and stop texts into their own types. Raises InputError for a value of a wrong type or out of range."""
        check_text("question", self.question, "ask_batch")
        for name, typed in (
            ("seed", seed_of),
            ("max_tokens", partial(whole, "max_tokens")),
            ("temperature", partial(number, "temperature")),
            ("top_p", partial(number, "top_p")),
            ("stop", stops_of),
        ):
            object.__setattr__(self, name, typed(getattr(self, name)))
        if self.max_tokens < 1:
            raise InputError(f"got max_tokens {self.max_tokens}, expected at least 1")
        check_temperature("temperature", self.temperature)
        if not 0 <= self.top_p <= 1:
            raise InputError(f"got top_p {self.top_p}, expected 0 (the likeliest token alone) to 1 (all of them)")

    @property
    def sampled(self) -> bool:
        """Whether its answer is drawn."""
        return self.temperature > 0

    @property
    def sampling(self) -> dict[str, float]:
        """How tokens are taken; answers that share forward passes are alike in it."""
        return {"temperature": self.temperature, "top_p": self.top_p if self.sampled else 1.0}


def check_temperature(name: str, value: float) -> None:
    if not 0 <= value <= 100:
        raise InputError(f"got {name} {value}, expected 0 (greedy) to 100")


def stops_of(value: Any) -> tuple[str, ...]:
    """One text or several as a tuple. Raises InputError for anything else, and for an empty text, at which everything would stop."""
    stops = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise InputError(f"got stop {reprlib.repr(value)}, expected a text or several, none of them empty")
    return stops


def check_text(name: str, text: Any, several: str) -> None:
    """Raises InputError if `text` is not a string; `several`: the method that takes many at once."""
    if not isinstance(text, str):
        raise InputError(f"got a {type(text).__name__} as {name}, expected a text; several at once are for {several}")


@dataclass
class ImageResult:
    """A picture and what it took. `settings`: everything needed to make it again."""

    image: Image
    seed: int
    nfe: int  # velocity evaluations this picture took
    # Seconds of prefill, denoise and decode, shared by the pictures of a batch; of think, if plans were written, and of measure, as in
    # TextResult. A student's lone request reads its last text in `denoise`.
    timings: dict[str, float]
    thinking: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reused: int = 0  # tokens of its context that were prefilled for an earlier request
    tau: float | None = None  # of the plan, as in TextResult
    drafter: str | None = None


@dataclass
class TextResult:
    """An answer and what it took."""

    text: str
    tokens: int  # generated
    prompt_tokens: int  # of the context, image tokens included
    timings: dict[str, float]  # seconds of prefill and decode; of measure, if the costs of drafting were measured first
    thinking: str | None = None
    finish_reason: str = "stop"  # or "length"
    tau: float | None = None  # mean tokens per forward of the model after the prefill's, if there was a drafter and any such forward
    drafter: str | None = None  # the one that drafted most rounds of this request; "none" if drafting did not pay
    reused: int = 0  # tokens of the context that an earlier request had read
    stopped_at: str | None = None  # the stop text before which it ended

    @property
    def tok_per_second(self) -> float:
        """Tokens that decoding yielded per second of it, a stop token included. An answer's first token comes with the prefill."""
        last = self.finish_reason if self.stopped_at is None else "length"  # its last token is among `tokens`
        return after_first(self.tokens, last) / max(self.timings["decode"], 1e-9)


def after_first(tokens: int, finish_reason: str) -> int:
    """How many tokens decoding yielded for an answer of so many whose first came with the prefill; the stop token counts, too."""
    return max(0, tokens - 1 + (finish_reason == "stop"))


# Called after each denoising update with (updates done, updates in all, latents [B, N, C]); may raise to stop the work.
OnStep = Callable[[int, int, Any], None]
# Called with (row, token id) for each generated token; may raise to stop the work.
OnToken = Callable[[int, int], None]
# Called with (index of a request, token id) after OnToken: whether its answer ends there.
Until = Callable[[int, int], bool]
T = TypeVar("T")


def of_rows(call: Callable[[int, T], None] | None, members: Sequence[int]) -> Callable[[int, T], None] | None:
    """A callback (row, what is told of it) that hears of row r as members[r]."""
    return call and (lambda row, told: call(members[row], told))


def with_pictures(request: ImageRequest) -> ImageRequest:
    """The request with its pictures opened, as RGB. In the interleaved form a string is a text, not a path."""
    inputs = request.inputs and tuple(item if isinstance(item, str) else as_picture(item) for item in request.inputs)
    given: dict[str, Any] = {"images": tuple(map(as_picture, request.images)), "inputs": inputs}
    given["mask"] = None if request.mask is None else as_mask(request.mask)
    given |= {name: None if (value := getattr(request, name)) is None else str(value) for name in ("student", "drafter")}
    return replace(request, **given)
