"""Contexts of a distillation batch: prefilled once by the frozen base, then shared by student, teacher, fake model and discriminator.

After that, only noisy tokens run through a generation expert. Their keys and values are concatenated to the context's, so gradients flow
through them and the context is never written to.

Shape legend: B samples, K slots of the context, N latent tokens, C values of a token, E hidden size, H key-value heads, D values of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hyperbagel.core.errors import InputError
from hyperbagel.data.packing import Encode, PackSpec, grid, pack
from hyperbagel.data.plan import Sample, Text, VaeImage, VitImage
from hyperbagel.data.transforms import grid_positions, patchify, to_tensor
from hyperbagel.flow.guidance import guidance_on, guide_each
from hyperbagel.generate.types import Denoising
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.model.student import StudentNetwork
from hyperbagel.nn.kv_cache import KVCache, Plan
from hyperbagel.nn.masks import dense_mask


@dataclass
class Context:
    """Keys and values [B, H, K, D] of each layer, which slots hold a token [B, K], and each sample's next position [B].

    whole: every slot holds one (a batch of one sample, as at 7B), so attention needs no mask; fused kernels are fastest without.
    """

    k: list[Tensor]
    v: list[Tensor]
    seen: Tensor
    position: Tensor
    whole: bool = False

    def repeat(self, times: int) -> Context:
        """Each row repeated `times` times, copies side by side."""
        if times == 1:
            return self
        k, v = ([x.repeat_interleave(times, dim=0) for x in store] for store in (self.k, self.v))
        return Context(k, v, self.seen.repeat_interleave(times, dim=0), self.position.repeat_interleave(times), self.whole)


class _Behind(KVCache):
    """A context as a cache: new tokens are placed behind its keys and values, and never stored."""

    def __init__(self, context: Context) -> None:
        rows, heads, _, head_dim = context.k[0].shape
        super().__init__(len(context.k), heads, head_dim, rows=rows, device=context.k[0].device, dtype=context.k[0].dtype)
        self.k, self.v = context.k, context.v

    def append(self, layer: int, plan: Plan, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.k[layer].to(k.dtype), k], dim=2), torch.cat([self.v[layer].to(v.dtype), v], dim=2)


@dataclass
class Conditions:
    """B samples of one kind and one size: what the student sees, and their true pictures.

    `text_dropped` and `image_dropped` are the contexts of the guidance branches; without input pictures the latter is `full`.
    """

    source: str
    is_edit: bool
    grid: tuple[int, int]  # latent tokens (h, w)
    where: Tensor  # [B, N] latent positions
    x0: Tensor  # [B, N, C] latents of the true pictures; zeros if they were not asked for
    markers: Tensor  # [B, 2, E] vision_start, vision_end
    full: Context
    text_dropped: Context
    image_dropped: Context
    samples: list[Sample]

    def __len__(self) -> int:
        return self.x0.shape[0]

    def repeat(self, times: int) -> Conditions:
        """Each row repeated `times` times, copies side by side."""
        if times == 1:
            return self
        rows = {name: getattr(self, name).repeat_interleave(times, dim=0) for name in ("where", "x0", "markers")}
        full = self.full.repeat(times)
        image_dropped = full if self.image_dropped is self.full else self.image_dropped.repeat(times)
        samples = [sample for sample in self.samples for _ in range(times)]
        return replace(self, **rows, full=full, text_dropped=self.text_dropped.repeat(times), image_dropped=image_dropped, samples=samples)

    @property
    def branches_dropped(self) -> list[Context]:
        return [self.text_dropped] if self.image_dropped is self.full else [self.text_dropped, self.image_dropped]


@dataclass
class Measured:
    """Held-out conditions, two noises, the teacher's latents for them [2, B, N, C], and the ViT features of these [2, B, values]."""

    conditions: Conditions
    noises: Tensor
    teacher: Tensor
    features: Tensor


def split_sample(sample: Sample) -> tuple[Sample, VaeImage, int]:
    """(items before the picture to draw, that picture, index of the text that guidance drops). Raises InputError if there is no picture to
    draw, or no text before it."""
    for i, item in enumerate(sample):
        if isinstance(item, VaeImage) and item.loss:
            before = sample[:i]
            prompts = [j for j, text in enumerate(before) if isinstance(text, Text) and text.enable_cfg]
            if not prompts:
                break
            return before, item, prompts[-1]
    raise InputError(
        "distillation: got a sample without a text and a picture to draw after it, expected sources of the kinds t2i and edit, "
        "leave the others out of data.sources"
    )


def _tokens(items: Sample, spec: PackSpec) -> int:
    """The number of tokens of some items, in both streams."""
    return sum(2 + (len(item.ids) if isinstance(item, Text) else math.prod(grid(item, spec))) for item in items)


def _position(items: Sample) -> int:
    """The RoPE position behind some items: a text takes one per token, a picture takes one."""
    return sum(len(item.ids) + 2 if isinstance(item, Text) else 1 for item in items)


@torch.no_grad()
def prefill(model: Bagel, samples: Sequence[Sample], spec: PackSpec, encode: Encode, generator: torch.Generator) -> tuple[Context, Tensor]:
    """One forward of the base over all contexts, one per row. A sample may be empty.

    Returns the context, and each slot's place in reading order [B, K].
    """
    rows = [i for i, sample in enumerate(samples) if sample]
    position = torch.tensor([_position(sample) for sample in samples], device=model.device)
    llm = model.config.llm
    if not rows:
        empty = torch.zeros(len(samples), llm.num_key_value_heads, 0, llm.head_dim, device=model.device, dtype=model.dtype)
        nothing = torch.zeros(len(samples), 0, dtype=torch.bool, device=model.device)
        return Context([empty] * llm.num_hidden_layers, [empty] * llm.num_hidden_layers, nothing, position), nothing.long()
    batch = pack([samples[i] for i in rows], spec, encode=encode, generator=generator, device=model.device)
    cache, slots = model.new_cache(len(rows)), batch.positions.shape[1]
    cache.reserve(slots)
    plan = Plan(slice(0, slots), slots, dense_mask(batch), causal=False)
    model.backbone(model.embed_packed(batch), batch.positions, cache=cache, plan=plan, wanted="")
    index = torch.tensor(rows, device=model.device)

    def spread(x: Tensor) -> Tensor:
        return x if len(rows) == len(samples) else x.new_zeros(len(samples), *x.shape[1:]).index_copy(0, index, x)

    whole = len(samples) == 1 and slots == _tokens(samples[0], spec)
    context = Context([spread(x) for x in cache.k], [spread(x) for x in cache.v], spread(batch.sample_id >= 0), position, whole)
    return context, spread(batch.order)


@torch.no_grad()
def make_conditions(
    model: Bagel,
    source: str,
    samples: Sequence[Sample],
    spec: PackSpec,
    encode: Encode,
    generator: torch.Generator,
    markers: Tensor,
    pictures: bool = True,
) -> Conditions:
    """Prefills a group of samples. markers: embeddings of vision_start and vision_end [1, 2, E]. pictures: also encode the true ones.

    A sample that holds its picture n times (`noise_copies`) gives n rows: one prefill serves n noise draws.
    Raises InputError for samples without a picture to draw, or with different sizes or kinds in one group.
    """
    parts = [split_sample(sample) for sample in samples]
    targets = [target.pixels for _, target, _ in parts]
    edits = {any(isinstance(item, VaeImage | VitImage) for item in before) for before, _, _ in parts}
    if len({pixels.shape for pixels in targets}) != 1 or len(edits) != 1:
        raise InputError(
            f"source {source!r}: got pictures of different sizes, or samples with and without input pictures, in one group, expected one "
            "kind; set data.sources.NAME.samples=1 and raise accumulate, or split the source"
        )
    is_edit = edits.pop()
    h, w = grid(parts[0][1], spec)
    x0 = torch.zeros(len(parts), h * w, spec.latent_values, device=model.device)
    if pictures:
        x0 = patchify(encode(to_tensor(torch.from_numpy(np.stack(targets)))).float(), spec.latent_patch)
    full, order = prefill(model, [before for before, _, _ in parts], spec, encode, generator)
    # Guidance drops the prompt and all that follows, and no earlier item sees these: the context without them is a prefix of the same keys.
    cut = torch.tensor([_tokens(before[:i], spec) for before, _, i in parts], device=full.seen.device)
    before_prompt = torch.tensor([_position(before[:i]) for before, _, i in parts], device=full.seen.device)
    text_dropped = replace(full, seen=full.seen & (order < cut[:, None]), position=before_prompt, whole=False)
    image_dropped = full
    if is_edit:  # the given texts alone, from position 0, as the sampler has them
        texts: list[Sample] = [[item for item in before if isinstance(item, Text) and not item.loss] for before, _, _ in parts]
        image_dropped, _ = prefill(model, texts, spec, encode, generator)
    n = min(_copies(sample) for sample in samples)
    where = grid_positions(h, w, spec.latent_per_side, spec.interpolate).to(x0.device).expand(n * len(parts), -1)
    markers, x0 = markers.expand(n * len(parts), -1, -1), x0.repeat_interleave(n, dim=0)
    rows = [sample for sample in samples for _ in range(n)]
    repeated = full.repeat(n)
    texts_alone = repeated if image_dropped is full else image_dropped.repeat(n)
    return Conditions(source, is_edit, (h, w), where, x0, markers, repeated, text_dropped.repeat(n), texts_alone, rows)


def some(rows: int, wanted: int) -> slice:
    """A slice of at most `wanted` of `rows` (0: all), evenly spread, because the copies of one sample are side by side."""
    return slice(None, None, -(-rows // wanted) if wanted else 1)


def _copies(sample: Sample) -> int:
    """How often a sample holds its first picture to draw."""
    _, target, _ = split_sample(sample)
    return sum(isinstance(item, VaeImage) and item.loss and item.pixels is target.pixels for item in sample)


def velocity(
    model: Bagel,
    context: Context,
    conditions: Conditions,
    x: Tensor,
    t: Tensor,
    guidance: Tensor | None = None,
    taps: list[Streams] | None = None,
) -> Tensor:
    """The velocity [B, N, C] of latents x [B, N, C] at times t [B] behind a context.

    guidance: [B, 1, E], added to the latent embeddings. taps: collects the hidden states of every layer. A noisy token sees the filled
    slots of its context, the two markers and all latents.
    """
    n = x.shape[1]
    g = model.embed_latent(x, t[:, None].expand(-1, n), conditions.where)
    if guidance is not None:
        g = g + guidance
    seen = None
    if not context.whole:
        own = torch.ones(len(x), n + 2, dtype=torch.bool, device=x.device)
        seen = torch.cat([context.seen, own], dim=1)[:, None, None, :]  # [B, 1, 1, K + N + 2]
    plan = Plan(slice(0, 0), context.seen.shape[1] + n + 2, seen, causal=False)
    positions = context.position[:, None].expand(-1, n + 2)
    x_t = Streams(conditions.markers.to(g.dtype), g)
    out = model.backbone(x_t, positions, cache=_Behind(context), plan=plan, taps=taps, wanted="g")
    assert out.g is not None
    return model.velocity(out.g)


def behind(model: Bagel, context: Context, text: Tensor) -> Tensor:
    """The understanding expert's hidden states [B, n, E] of texts behind a context, from their embeddings [B, n, E]. Token i of a text sees
    the context and tokens 0 to i; so padding, which comes last, is seen by no token that counts."""
    n = text.shape[1]
    past = context.seen[:, None].expand(-1, n, -1)  # [B, n, K]
    causal = torch.ones(n, n, dtype=torch.bool, device=text.device).tril()
    seen = torch.cat([past, causal.expand(len(text), -1, -1)], dim=2)[:, None]
    plan = Plan(slice(0, 0), seen.shape[-1], seen, causal=False)
    positions = context.position[:, None] + torch.arange(n, device=text.device)
    hidden = model.backbone(Streams(text, None), positions, cache=_Behind(context), plan=plan).u
    assert hidden is not None
    return hidden


@dataclass(frozen=True)
class Scales:
    """Guidance scales of B samples, each [B]."""

    text: Tensor
    image: Tensor


def student_velocity(
    network: StudentNetwork, conditions: Conditions, scales: Scales, x: Tensor, t: Tensor, taps: list[Streams] | None = None
) -> Tensor:
    """A student's velocity [B, N, C] at x [B, N, C], t [B]: one evaluation, whatever the scales. taps: as in `velocity`."""
    guidance = network.guidance(scales.text, scales.image)
    return velocity(network.model, conditions.full, conditions, x, t, guidance, taps)


@torch.no_grad()
def teacher_velocity(model: Bagel, conditions: Conditions, scales: Scales, x: Tensor, t: Tensor, settings: Denoising) -> Tensor:
    """The base's guided velocity, from two or three evaluations; interval and renormalisation come from `settings`.

    x [B, N, C], t [B]; scales [k B]: k for each sample, side by side, which share its evaluations. Returns [k B, N, C].
    """
    contexts = [conditions.full, *conditions.branches_dropped]
    times = len(scales.text) // len(x)
    # All branches, even where no sample is guided: ranks over which the base's weights are split must run it equally often.
    v, v_text, *v_image = (velocity(model, one, conditions, x, t).repeat_interleave(times, dim=0) for one in contexts)
    on = torch.tensor([guidance_on(one, settings.interval) for one in t.tolist()], device=x.device).repeat_interleave(times)
    # without input pictures, image_dropped is the full context
    return guide_each(v, v_text, v_image[0] if v_image else v, scales.text, scales.image, on, settings.renorm, settings.renorm_min)
