"""What is measured: single operations of the package, prepared one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image

from benchmarks import cost
from benchmarks.attention import DECODE_WAYS, STEP_WAYS, decode_attention, step_attention
from benchmarks.cost import Cost, Widths
from benchmarks.operation import Operation
from benchmarks.subjects import endless
from hyperbagel.flow.solvers import Velocity
from hyperbagel.generate.decode import EagerRunner, Runner
from hyperbagel.generate.graphs import GraphRunner, GraphVelocity
from hyperbagel.generate.image import GuidedVelocity, InTurnVelocity, latent_grid
from hyperbagel.generate.session import Parts, Session
from hyperbagel.generate.types import EDIT, TEXT_TO_IMAGE, Denoising
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.nn.quantized import bytes_of_a_weight

T = 0.7  # time of the measured steps: within the guidance interval of both kinds


@dataclass(frozen=True)
class Workload:
    """Sizes to measure at."""

    size: tuple[int, int]  # (height, width) of a picture, pixels
    prompt: int  # tokens of a picture's prompt
    texts: tuple[int, ...]  # tokens of the prefilled texts
    contexts: tuple[int, ...]  # cached tokens behind which text is decoded
    batches: tuple[int, ...] = (1, 4, 16)  # sessions that are decoded together
    pictures: tuple[int, ...] = (1, 4)  # per denoising step
    room: int = 512  # tokens for which a decoding's caches have room

    @classmethod
    def of(cls, parts: Parts) -> Workload:
        size = parts.model.config.options.default_size
        if min(size) < 256:
            return cls(size, 16, (16, 64), (16, 64, 256))
        return cls(size, 64, (64, 1024), (128, 2048, 8192))

    def smallest(self) -> Workload:
        """One size of each kind: a check that everything runs."""
        return replace(self, texts=self.texts[:1], contexts=self.contexts[:1], batches=(1, 2), pictures=(1,))


Ready = Callable[[], Operation]  # prepares the contexts, which the operation alone then holds, so that they are freed with it


def operations(parts: Parts, load: Workload, *, graphs: bool, compiler: str | None) -> Iterator[tuple[str, Ready]]:
    """Names and makers of all operations, the most important first. graphs: also steps as CUDA graphs. compiler: also steps it compiles."""
    ways = ["eager"] + ["graph"] * graphs + ["compiled"] * (compiler is not None)
    for way in ways:
        yield f"step {way} plain", partial(_step, parts, load, TEXT_TO_IMAGE, 1, False, way, compiler, plain=True)
        for n in load.pictures:
            yield f"step {way} guided x{n}", partial(_step, parts, load, TEXT_TO_IMAGE, n, False, way, compiler)
        yield f"step {way} edit", partial(_step, parts, load, EDIT, 1, True, way, compiler)
    yield "step eager guided, branches in turn", partial(_step, parts, load, TEXT_TO_IMAGE, 1, False, "in turn", None)
    yield "step eager edit, branches in turn", partial(_step, parts, load, EDIT, 1, True, "in turn", None)
    for way in ways:
        for context in load.contexts:
            for rows in load.batches:
                yield f"decode {way} x{rows} behind {context}", partial(_decode, parts, load, way, context, rows, compiler)
    for n in load.texts:
        yield f"prefill text {n}", partial(_text, parts, n)
    yield "prefill picture, ViT", partial(_vit, parts, load)
    yield "prefill picture, latents with VAE encode", partial(_latents, parts, load)
    yield "vae encode", partial(_vae, parts, load, encode=True)
    yield "vae decode", partial(_vae, parts, load, encode=False)
    n = latent_tokens(parts, load) + 2
    for way in STEP_WAYS:
        yield f"attention step, {way}", partial(step_attention, parts.model, way, n, load.prompt)
    for way in DECODE_WAYS:
        yield (
            f"attention decode x{load.batches[-1]}, {way}",
            partial(decode_attention, parts.model, way, load.batches[-1], load.contexts[-1]),
        )


def latent_tokens(parts: Parts, load: Workload) -> int:
    h, w = latent_grid(parts.model.config, load.size)
    return h * w


def words(parts: Parts, tokens: int) -> str:
    """A text that takes about `tokens` in a context, markers included; short words are one token each."""
    text = " red" * max(tokens - 2, 1)
    per_word = len(parts.tokenizer.encode(text)) / max(tokens - 2, 1)
    return " red" * max(round((tokens - 2) / per_word), 1)


def picture(load: Workload) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*load.size, 3), dtype=np.uint8))


def _step(
    parts: Parts, load: Workload, settings: Denoising, pictures: int, edit: bool, way: str, compiler: str | None, plain: bool = False
) -> Operation:
    """One velocity evaluation as the sampler makes it, all branches included."""
    if plain:
        settings = replace(settings, text_scale=1.0)
    sessions = []
    for _ in range(pictures):
        session = Session.new(parts)
        if edit:
            session.add_image(picture(load), latents=True)
        session.add_text(words(parts, load.prompt))
        sessions.append(session)
    grid = latent_grid(parts.model.config, load.size)
    n, config, device = grid[0] * grid[1], parts.model.config, parts.model.device
    branches = [[s.full() for s in sessions]]
    if not plain:
        branches.append([s.text_dropped() for s in sessions])
        if edit:
            branches.append([s.image_dropped() for s in sessions])
    x = torch.randn(pictures, n, config.latent_channels, generator=torch.Generator().manual_seed(0)).to(device)
    velocity: Velocity
    if way == "in turn":
        velocity = InTurnVelocity(sessions, [grid] * pictures, settings)
    else:
        velocity = GuidedVelocity(sessions, [grid] * pictures, settings)
        if way != "eager":
            velocity = GraphVelocity(velocity, compiler if way == "compiled" else None)
    contexts = [b.length for group in branches for b in group]
    found = cost.block(config, contexts, 2, n, _widths(parts.model), wanted=True)
    return Operation(lambda: velocity(x, T), found, "matmul", {"pictures": pictures, "latent_tokens": n, "contexts": contexts})


def _decode(parts: Parts, load: Workload, way: str, context: int, rows: int, compiler: str | None) -> Operation:
    """One step of greedy decoding as `decode` makes it, including the token's way to the CPU. The contexts hold random keys and values."""
    parts = endless(parts)
    model, generator = parts.model, torch.Generator(parts.model.device if parts.model.device.type == "cuda" else "cpu").manual_seed(0)
    cache = model.new_cache()
    cache.reserve(context)
    for store in (*cache.k, *cache.v):
        store.normal_(generator=generator)
    cache.advance([context])
    fast = GraphRunner(model, compiler=compiler if way == "compiled" else None)
    runner: Runner = EagerRunner(model) if way == "eager" else fast
    runner.begin([cache.fork() for _ in range(rows)], [context] * rows, load.room)
    last = [torch.full((rows, 1), parts.tokenizer.im_start, device=model.device)]

    def call() -> list[int]:
        last[0] = runner(last[0]).argmax(-1)[:, None]
        return [] if last[0].is_meta else last[0][:, 0].tolist()

    found = cost.decode(model.config, rows, context, _widths(model))
    return Operation(call, found, "copy", {"sessions": rows, "context": context}, rows)


def _text(parts: Parts, tokens: int) -> Operation:
    text = words(parts, tokens)
    n = len(parts.tokenizer.encode(text)) + 2
    found = cost.text(parts.model.config, n, _widths(parts.model))
    return Operation(lambda: Session.new(parts).add_text(text), found, "matmul", {"tokens": n})


def _read(parts: Parts, block: Callable[[Session], Streams]) -> None:
    """Prefill one block of a picture into a fresh cache."""
    session = Session.new(parts)
    session.add_blocks([block(session)])


def _vit(parts: Parts, load: Workload) -> Operation:
    """A picture as a question brings it: through the vision tower into the cache."""
    pixels = parts.vit_transform(parts.vae_transform.resize(picture(load)))
    config, widths = parts.model.config, _widths(parts.model)
    patches = (pixels.shape[1] // config.vit.patch_size) * (pixels.shape[2] // config.vit.patch_size)
    parts_cost = cost.vision(config, patches, widths.number), cost.block(config, [0], patches + 2, 0, widths, wanted=False)
    return Operation(lambda: _read(parts, lambda session: session.vit_block(pixels)), _sum(*parts_cost), "matmul", {"patches": patches})


def _latents(parts: Parts, load: Workload) -> Operation:
    """A picture as an edit brings it: VAE encode, then clean latents into the cache."""
    pixels, config = parts.vae_transform(picture(load)), parts.model.config
    size = pixels.shape[1], pixels.shape[2]
    n = size[0] * size[1] // config.latent_stride**2
    parts_cost = cost.autoencoder(config, size, encode=True), cost.block(config, [0], 2, n, _widths(parts.model), wanted=False)
    total = _sum(*parts_cost)
    return Operation(lambda: _read(parts, lambda session: session.latent_block(pixels, None)), total, "matmul", {"latent_tokens": n})


def _vae(parts: Parts, load: Workload, *, encode: bool) -> Operation:
    """The autoencoder's encoder or decoder. It is fp32, so its fraction of a bf16 matmul rate says little."""
    config, device = parts.model.config, parts.model.device
    f, generator = config.vae.downsample, torch.Generator().manual_seed(0)
    latent = torch.randn(1, config.vae.z_channels, load.size[0] // f, load.size[1] // f, generator=generator).to(device)
    pixels = torch.randn(1, config.vae.in_channels, *load.size, generator=generator).to(device)
    call = (lambda: parts.vae.encode(pixels, latent)) if encode else (lambda: parts.vae.decode(latent))
    return Operation(call, cost.autoencoder(config, load.size, encode=encode), "matmul", {"size": list(load.size)})


def _widths(model: Bagel) -> Widths:
    width = model.dtype.itemsize
    return Widths(width, bytes_of_a_weight(model.codes, model.config.llm.hidden_size) if model.codes else width)


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(a.flops + b.flops, a.bytes + b.bytes)
