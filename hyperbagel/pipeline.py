"""`HyperBagel`: loads a checkpoint, then draws, edits and answers."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.core.hardware import clock, usable_device
from hyperbagel.core.values import seed_of, whole
from hyperbagel.data.images import as_picture
from hyperbagel.data.prompts import THINK_ANSWER, THINK_DRAW
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.generate.contexts import Contexts, read
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.image import decode_latents, denoise, draw_noise, in_passes, latent_grid
from hyperbagel.generate.image import passes as passes
from hyperbagel.generate.mask import check_mask, first_picture, kept_of, masked
from hyperbagel.generate.planner import Planner
from hyperbagel.generate.session import Parts, Session
from hyperbagel.generate.students import Students
from hyperbagel.generate.types import (
    AskRequest,
    Denoising,
    ImageRequest,
    ImageResult,
    OnStep,
    OnToken,
    TextResult,
    asked_for,
    of_rows,
    with_pictures,
    with_sampler,
)
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.planner import planner_folder
from hyperbagel.model.student import Sampler, read_merged_sampler
from hyperbagel.nn.attention import check_backend
from hyperbagel.nn.quantized import numbers
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.answers import OnAnswer, Visitors, write_answers
from hyperbagel.speculative.choose import NONE, Drafters
from hyperbagel.speculative.thinking import Ready, check_length, write_plans, written_together

Picture = Image | str | Path  # a PIL image of any mode, or the path of one


class HyperBagel:
    """One loaded model. Nothing that a request does changes it, so one object may serve any number of requests in turn."""

    def __init__(
        self,
        parts: Parts,
        name: str,
        load_seconds: float = 0.0,
        students: Path | None = None,
        drafters: Path | None = None,
        sampler: Sampler | None = None,
        graphs: bool = False,
        planner: Path | None = None,
    ) -> None:
        """students, drafters: folders with those that came with the model, each under its name. sampler: that of a student merged into the
        model, if any. graphs: see from_pretrained. planner: the folder of one that came with the model; it need not be there."""
        self.parts, self.name, self.load_seconds = parts, name, load_seconds
        self.students, self.sampler = Students(parts.model, students), sampler
        self.runner = GraphRunner(parts.model) if graphs else None
        self.drafters = Drafters(parts, drafters, self.runner)
        self.planner = Planner(parts.model, planner, self.runner)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "toybox",
        *,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "int8", "nf4"] | torch.dtype | None = None,
        attention: Literal["sdpa", "reference", "flash"] = "sdpa",
        graphs: bool = False,
        planner: str | Path | None = None,
    ) -> HyperBagel:
        """Loads "toybox" (ships with the package) or a folder in BAGEL's layout.

        Args:
            device: "cpu", "cuda", ...; default: a GPU if there is one.
            dtype: of the weights and the computation; default: float32 on a CPU, bfloat16 on a GPU. The autoencoder is always float32.
                "int8" and "nf4" compute in that default and store the decoder's matrices in 8 or 4 bits (nn.quantized).
            attention: "sdpa" runs everywhere; "flash" uses flash-attn, if installed, where there is no mask; "reference" is slow and plain.
            graphs: text is decoded, and the drafts of a named drafter are made and verified, in steps of fixed shapes, on a GPU replayed
                as CUDA graphs: launching the kernels of one token takes longer there than running them. Slower on a CPU.
            planner: who writes plans: a planner's folder, or "none" for the model itself; default: MODEL/planner if there is one.
        Raises:
            InputError: the folder, device, dtype or planner cannot be used.
        """
        start = time.perf_counter()
        folder = model_folder(model)
        where = usable_device(device)
        kind, codes = numbers(dtype, where)
        check_backend(attention, where, kind)
        plans = planner_folder(planner, folder)  # before the weights: a wrong name is told at once
        parts = Parts.load(folder, where, kind, attention, codes)
        spent, sampler = time.perf_counter() - start, read_merged_sampler(folder)
        loaded = cls(parts, str(model), spent, folder / "students", folder / "drafters", sampler, graphs, plans)
        if planner is not None:
            loaded.planner.ask_for(str(planner))
        return loaded

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) of a picture if a request does not say."""
        return self.parts.model.config.options.default_size

    def forget_graphs(self) -> None:
        """Frees the caches and graphs that are kept for later requests."""
        for runner in filter(None, (self.runner, self.planner.runner)):
            runner.forget()

    # -- one request -----------------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str, *, n: int = 1, seed: int | None = None, on_step: OnStep | None = None, **settings: Any
    ) -> list[ImageResult]:
        """Draws `n` pictures, with seeds seed, seed + 1, ... (None: a random one). settings: fields of ImageRequest."""
        return self._pictures(ImageRequest(prompt, **settings), n, seed, on_step)

    def edit(
        self,
        images: Picture | Sequence[Picture],
        instruction: str,
        *,
        n: int = 1,
        seed: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> list[ImageResult]:
        """Changes a picture, or composes several, as the instruction says; `n` results, seeds as in `generate`. A picture is a PIL image or
        a path. settings: fields of ImageRequest."""
        given = _tuple(images)
        if not given:
            raise InputError("got no image to edit, expected at least one; to draw from text alone use generate")
        return self._pictures(ImageRequest(instruction, given, **settings), n, seed, on_step)

    def ask(
        self, question: str, images: Picture | Sequence[Picture] = (), *, on_token: OnToken | None = None, **settings: Any
    ) -> TextResult:
        """Answers a question about any number of pictures, PIL images or paths. settings: fields of AskRequest."""
        return self.ask_batch([AskRequest(question, _tuple(images), **settings)], on_token=on_token)[0]

    def _pictures(self, request: ImageRequest, n: int, seed: int | None, on_step: OnStep | None) -> list[ImageResult]:
        if whole("n", n) < 1:
            raise InputError(f"got n {n}, expected at least 1 picture")
        first = random.SystemRandom().randrange(2**31) if seed is None else seed_of(seed)
        return self.generate_batch([replace(request, seed=first + i) for i in range(n)], on_step=on_step)

    # -- batches ---------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate_batch(
        self,
        requests: Sequence[ImageRequest],
        *,
        on_step: OnStep | None = None,
        on_token: OnToken | None = None,
        contexts: Contexts | None = None,
    ) -> list[ImageResult]:
        """Draws or edits many at once; each result is what its request alone would give. Sizes and prompts may differ; requests with
        equal denoising settings share forwards, up to generate.image.MOST_LATENTS.

        Args:
            on_step: called after each denoising update of those that share forwards, with their latents alone.
            on_token: called with (index of the request, token id) for each token of a plan (`think`).
            contexts: where prefilled pictures are looked for, and kept for the next call.
        Raises:
            InputError: a request that cannot be met; found before any work starts, where that is possible.
        """
        requests = [with_pictures(request) for request in requests]
        for request in requests:
            self._check(request)
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            plan = (self._drafter_name(request), request.think_temperature or 0.0) if request.think else None
            groups[self.settings(request), request.is_edit, plan].append(i)  # a group has like branches, so one NFE
        results, where = dict[int, ImageResult](), self.parts.model.device
        for (settings, _, plan), members in in_passes(groups, [math.prod(self.grid(request)) for request in requests]):
            start = clock(where)
            later = settings.student is not None and len(members) == 1  # the first evaluation then reads the last text
            drafter = None if plan is None else self._drafter(plan[0])
            chosen = [requests[i] for i in members]
            prepared = [self._prepare(request, contexts, later, drafter) for request in chosen]
            grids = [self.grid(request) for request in chosen]
            noises = [draw_noise(self.parts, grid, ready.generator) for grid, ready in zip(grids, prepared)]
            kept = [kept_of(self.parts, request, grid) for request, grid in zip(chosen, grids)]
            timings = {"prefill": clock(where) - start}
            if plan is not None:
                timings |= self._think(chosen, prepared, later, of_rows(on_token, members))
            middle = clock(where)
            student = self.students.get(settings.student).network if settings.student else None
            latents, nfe = denoise([ready.session for ready in prepared], grids, noises, settings, on_step, student=student, kept=kept)
            late = clock(where)
            images = [masked(self.parts, request, decode_latents(self.parts, x, grid)) for request, x, grid in zip(chosen, latents, grids)]
            timings |= {"denoise": late - middle, "decode": clock(where) - late}
            for i, request, image, ready in zip(members, chosen, images, prepared, strict=True):
                used = {"model": self.name, "prompt": request.prompt, "seed": request.seed, "think": request.think, **asdict(settings)}
                used |= {"size": [image.width, image.height], "nfe": nfe, "dtype": self.parts.model.precision}
                used |= asked_for(request) | (self.planner.asked if request.think else {})
                results[i] = ImageResult(image, request.seed, nfe, timings, ready.thinking, used, ready.reused, **ready.drafted)
            del prepared, ready, noises, latents, kept  # the next contexts come into their room
        return [results[i] for i in range(len(requests))]

    @torch.inference_mode()
    def ask_batch(
        self,
        requests: Sequence[AskRequest],
        *,
        on_token: OnToken | None = None,
        on_answer: OnAnswer | None = None,
        visitors: Visitors | None = None,
        contexts: Contexts | None = None,
    ) -> list[TextResult]:
        """Answers many at once; requests with equal max_tokens, `sampling` and drafter are decoded together. on_token: called with (index
        of the request, token id); on_answer: with (index, answer) as soon as that is whole. visitors: join requests that are all decoded
        together, and take the next indices; answers that nobody waited for are left out. contexts: where what was read for earlier
        questions is looked for, and kept for the next call.

        A drafter changes only the speed; one that draws (a chain) keeps the distribution of sampled answers, but no seed repeats them. If
        one cannot be used, a warning says so and the answer comes without it. Raises InputError for a request that cannot be met.
        """
        requests = [self._asked(request) for request in requests]
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[request.max_tokens, self._drafter_name(request), *request.sampling.values()].append(i)
        results, where, alone = dict[int, TextResult](), self.parts.model.device, len(groups) == 1
        assert alone or visitors is None, "got visitors beside requests of several kinds, expected one kind"
        for (_, name, temperature, _), members in groups.items():
            start, drafter = clock(where), self._drafter(name)
            prepare = partial(self._context, drafter=drafter, contexts=contexts)
            sessions = [prepare(requests[i]) for i in members]
            timings = {"prefill": clock(where) - start} | self._measure(drafter, sessions[0], [len(sessions)], temperature)
            how: dict[str, Any] = {"drafter": drafter, "runner": self.runner, "prepare": prepare}
            if alone:  # rows are requests, and visitors come behind them
                return write_answers(requests, sessions, timings, on_token=on_token, on_answer=on_answer, visitors=visitors, **how)
            how |= {"on_token": of_rows(on_token, members), "on_answer": of_rows(on_answer, members)}
            results |= zip(members, write_answers([requests[i] for i in members], sessions, timings, **how), strict=True)
        return [results[i] for i in range(len(requests))]

    # -- contexts --------------------------------------------------------------------------------------------------------------

    def settings(self, request: ImageRequest, *, warn: bool = True) -> Denoising:
        """How a request is denoised: as it says, else by its student's sampler (merged ones have theirs too), else by the defaults."""
        if request.student in (None, "none"):
            own = replace(request, student=None)
            if self.sampler is not None:
                return with_sampler(own, self.sampler, warn=warn)
            found = own.with_defaults(self.parts.model.config.options).denoising()
            if warn and (own.image_scale or 1) > 1 and found.text_scale <= 1:
                told = f"got image_scale {own.image_scale:g} with text_scale {found.text_scale:g}, which switches guidance off"
                warnings.warn(f"{told}; set text_scale above 1 to guide at all", Notice, stacklevel=2)
            return found
        return with_sampler(request, self.students.get(str(request.student)).sampler, warn=warn)

    def _check(self, request: ImageRequest) -> None:
        """Raises InputError for everything that can be refused before work starts."""
        items = request.items()
        if not any(isinstance(item, str) and item.strip() for item in items):
            raise InputError("got an empty prompt, expected some text")
        if request.size is not None:
            latent_grid(self.parts.model.config, request.size)
        if request.student not in (None, "none"):
            self.students.get(str(request.student))
        self.drafters.check(request.drafter)
        if request.think:
            self.planner.get()
            if request.is_edit and not self.parts.model.config.options.planned_edits:
                warnings.warn("got an edit with a plan, which this model was not trained for; leave think out", Notice, stacklevel=3)
        request.denoising()
        if request.mask is not None:
            check_mask(request.mask, first_picture(request))
        check_length(request, self.parts.tokenizer, self.parts.model.config.llm.max_position_embeddings)

    def grid(self, request: ImageRequest) -> tuple[int, int]:
        """Latent (rows, columns): of the size asked for, else of the picture under the mask, of the last picture, or the model's own."""
        pictures = [item for item in request.items() if isinstance(item, Image)]
        size = request.size or self.default_size
        if request.size is None and pictures:
            width, height = self.parts.vae_transform.size(*pictures[-1 if request.mask is None else 0].size)
            size = height, width
        return latent_grid(self.parts.model.config, size)

    def _prepare(
        self, request: ImageRequest, contexts: Contexts | None = None, later: bool = False, drafter: Adaptive | None = None
    ) -> Ready:
        """Prefills everything that a picture is drawn from, but its plan. later: see Session.add_text. drafter: of the plan."""
        generator = torch.Generator().manual_seed(request.seed)
        session, items, reused = Session.new(self.parts, () if drafter is None else drafter.taps), request.items(), 0
        images = list(takewhile(lambda item: isinstance(item, Image), items))
        if request.think:
            session.add_text(THINK_DRAW)
        elif contexts is not None and images:
            session, reused = contexts.begin(self.parts, [image for image in images if isinstance(image, Image)], generator)
            items = items[len(images) :]
        for item in items:
            if isinstance(item, str):
                session.add_text(item, later=later or request.think)
            else:
                session.add_image(item, latents=True, generator=generator)
        return Ready(session, generator, reused, drafter)

    def _think(
        self, requests: Sequence[ImageRequest], prepared: Sequence[Ready], later: bool = False, on_token: OnToken | None = None
    ) -> dict[str, float]:
        """Writes the pictures' plans, at one temperature, behind their contexts; returns the seconds that took. later: as in `_prepare`."""
        sessions, drafter = [ready.session for ready in prepared], prepared[0].drafter
        most, (writer, runner) = [request.max_think_tokens for request in requests], self.planner.get()
        temperature, sizes = requests[0].think_temperature or 0.0, {len(rows) for _, rows in written_together(sessions, most, drafter)}
        spent = self._measure(drafter, sessions[0], sizes, temperature)
        start = clock(self.parts.model.device)
        how: dict[str, Any] = {"temperature": temperature, "seeds": [request.seed for request in requests], "on_token": on_token}
        plans = write_plans(sessions, most, writer=writer, drafter=drafter, runner=runner, later=later, **how)
        for ready, plan in zip(prepared, plans, strict=True):
            ready.thinking, ready.drafted = plan.text, plan.drafted
        return spent | {"think": clock(self.parts.model.device) - start}

    def _measure(self, drafter: Adaptive | None, session: Session, sizes: Iterable[int], temperature: float = 0.0) -> dict[str, float]:
        """Has the costs of drafting measured, once per batch size; returns the seconds as `measure` if it took any."""
        if drafter is None:
            return {}
        start = clock(self.parts.model.device)
        for rows in sizes:
            drafter.prepare(session, rows, temperature)
        spent = clock(self.parts.model.device) - start
        return {"measure": spent} if spent > 0.01 else {}

    def _drafter_name(self, request: AskRequest | ImageRequest) -> str:
        """If none is named, the default drafts where it changes no result: greedy answers, sampled ones that repeat, plans in fp32."""
        if request.drafter is not None:
            return request.drafter
        exact = self.parts.model.dtype == torch.float32 or isinstance(request, AskRequest)
        return self.drafters.default(request.sampled) if exact else NONE

    def _drafter(self, name: str) -> Adaptive | None:
        """The drafter of a known name; None, with a warning, if it cannot be used."""
        if name == NONE:
            return None
        try:
            return self.drafters.budgeted(name)
        except InputError as error:  # a drafter that is damaged or does not fit only costs speed
            warnings.warn(f"{error}; going on without a drafter", Notice, stacklevel=3)
            return None

    def _asked(self, request: AskRequest) -> AskRequest:
        """The request with its pictures opened. Raises InputError for what can be refused before work starts."""
        if not request.question.strip():
            raise InputError("got an empty question, expected some text")
        self.drafters.check(request.drafter)
        return replace(request, images=tuple(map(as_picture, request.images)))

    def _context(self, request: AskRequest, drafter: Adaptive | None = None, contexts: Contexts | None = None) -> Session:
        """Prefills everything that a question is answered from, and opens the answer."""
        request, taps = self._asked(request), () if drafter is None else drafter.taps
        items: list[str | Image] = [*[THINK_ANSWER] * request.think, *request.images, *chain(*request.turns), request.question]
        if contexts is not None:
            return contexts.ask(self.parts, items, taps)
        session = Session.new(self.parts, taps)
        read(session, items)
        session.open_answer()
        return session


def model_folder(model: str | Path) -> Path:
    """The folder of "toybox", which ships with the package, or the one given. Raises InputError for an empty name."""
    if not str(model).strip():
        raise InputError("got an empty name of a model, expected 'toybox' or a folder; is a variable not set?")
    return Path(str(files("hyperbagel") / "assets" / "toybox")) if str(model) == "toybox" else Path(model)


def check_request(model: str | Path, **settings: Any) -> None:
    """Checks a picture's size and lengths by a model's files, before its weights are loaded. Raises InputError for what it cannot do."""
    folder, request = model_folder(model), ImageRequest(**settings)
    config = BagelConfig.from_folder(folder)
    if request.size is not None:
        latent_grid(config, request.size)
    check_length(request, Tokenizer.from_folder(folder), config.llm.max_position_embeddings)


def _tuple(images: Picture | Sequence[Picture]) -> tuple[Any, ...]:
    """One picture or several as a tuple; a string is one path, not many letters. What is no picture is refused later."""
    return tuple(images) if isinstance(images, Iterable) and not isinstance(images, (Image, str, Path)) else (images,)
