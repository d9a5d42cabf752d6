"""Denoises latents after prefilled contexts, and turns them into pictures.

Shape legend: B requests, N latent tokens of the largest picture, C values of a token, R = B * branches rows of one forward.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hyperbagel.core.errors import InputError
from hyperbagel.data.transforms import grid_positions
from hyperbagel.flow.guidance import guidance_on, guide
from hyperbagel.flow.schedule import time_grid
from hyperbagel.flow.solvers import Velocity, euler_steps
from hyperbagel.generate.graphs import GraphVelocity
from hyperbagel.generate.mask import Kept, MaskedVelocity
from hyperbagel.generate.session import Branch, Parts, Session, check_latent_grid
from hyperbagel.generate.types import Denoising, OnStep
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.model.student import StudentNetwork
from hyperbagel.model.vae import unpatchify
from hyperbagel.nn.kv_cache import KVCache, Plan

K = TypeVar("K", bound=Hashable)


class GuidedVelocity:
    """velocity(x_t [B, N, C], t) -> v [B, N, C] of a batch of prefilled sessions. `evaluations` counts its NFE per picture.

    The contexts of all branches lie in one stacked cache, rows [full | text dropped | image dropped], so that a guided step is one
    forward. The latents' keys go into scratch slots after each row's context, which the next step overwrites.

    A `student` takes the scales as inputs: one row a request, one evaluation per step. The contexts are the model's own; a text that
    waits in a lone session is read in the first evaluation (by the model's own weights, which a student shares).
    """

    def __init__(
        self, sessions: Sequence[Session], grids: Sequence[tuple[int, int]], settings: Denoising, student: StudentNetwork | None = None
    ) -> None:
        self.parts, self.settings, self.evaluations = sessions[0].parts, settings, 0
        self.model = self.parts.model if student is None else student.model
        self.guidance: Tensor | None = None  # [B, 1, E]
        if student is not None:
            scales = (torch.full((len(sessions),), s, device=self.model.device) for s in (settings.text_scale, settings.image_scale))
            self.guidance = student.guidance(*scales)
        waiting = sessions[0].waiting if student is not None and len(sessions) == 1 else []
        if waiting:
            branches = [[sessions[0].so_far()]]
        else:
            branches = _branches(sessions, settings) if student is None else [[s.full() for s in sessions]]
        self.branches, self.image_branch = len(branches), len(branches) > 2
        rows = [branch for group in branches for branch in group]
        model, device = self.parts.model, self.parts.model.device
        counts = [h * w for h, w in grids]
        n = max(counts)
        inside = torch.arange(n) < torch.tensor(counts)[:, None]
        self.inside = None if min(counts) == n else inside.unsqueeze(-1).to(device)  # [B, N, 1], only if sizes differ
        self.where = _table_rows(grids, model.config).to(device)
        self.markers = sessions[0].markers().expand(len(rows), -1, -1)
        self.positions = torch.tensor([b.position + len(waiting) for b in rows], device=device)[:, None].expand(-1, n + 2)
        cache = KVCache.stack([b.view() for b in rows], len(waiting) + n + 2)
        self.text: _Text | None = None
        if waiting:
            self.text = _Text.before(cache, waiting, n + 2, model, rows[0].position)
            cache.advance([len(waiting)])  # reserves its slots; the first evaluation fills them
        self.guided = cache, cache.plan([c + 2 for c in counts] * self.branches, causal=False)
        self.plain = self.guided
        if self.branches > 1:
            full = cache.view(slice(len(sessions)))
            self.plain = full, full.plan([c + 2 for c in counts], causal=False)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.evaluate(x, torch.full(x.shape[:2], t, device=x.device), self.begin(t))

    def begin(self, t: float) -> bool:
        """Whether the step at t is guided. Adds its evaluations to the count."""
        with_guidance = self.branches > 1 and guidance_on(t, self.settings.interval)
        self.evaluations += self.branches if with_guidance else 1
        return with_guidance

    def evaluate(self, x: Tensor, t: Tensor, with_guidance: bool) -> Tensor:
        """The device's part of a step, with the same shapes every time: x [B, N, C], t [B, N] -> v [B, N, C]."""
        branches = self.branches if with_guidance else 1
        cache, plan = self.guided if with_guidance else self.plain
        model, rows = self.model, x.shape[0] * branches
        g = model.embed_latent(x, t, self.where)
        g = (g if self.guidance is None else g + self.guidance).repeat(branches, 1, 1)
        u, where = self.markers[:rows], self.positions[:rows]
        if self.text is not None:
            text, self.text = self.text, None
            u, where, plan = torch.cat([text.u, u], dim=1), text.positions, text.plan
        hidden = model.backbone(Streams(u, g), where, cache=cache, plan=plan, wanted="g")
        assert hidden.g is not None
        v = model.velocity(hidden.g)  # [R, N, C]
        if self.inside is not None:
            v = v * self.inside.repeat(branches, 1, 1)
        if not with_guidance:
            return v
        parts = v.chunk(branches)
        s = self.settings
        v_image = parts[2] if self.image_branch else parts[0]
        return guide(parts[0], parts[1], v_image, s.text_scale, s.image_scale, s.renorm, s.renorm_min)


class _Text(NamedTuple):
    """A text of m tokens that the first evaluation reads: its embeddings u [1, m, E], that forward's positions [1, m + N + 2] and plan."""

    u: Tensor
    positions: Tensor
    plan: Plan

    @classmethod
    def before(cls, cache: KVCache, ids: Sequence[int], n: int, model: Bagel, position: int) -> _Text:
        """Text `ids` from `position` on, before n tokens that share the position after it and see all of it: each token of the text is
        a block of its own."""
        own = torch.arange(len(ids) + n, device=model.device).clamp(max=len(ids))
        u = model.embed_text(torch.tensor([list(ids)], device=model.device))
        return cls(u, position + own[None], cache.plan_blocks(own))


# From this many latent tokens on, one picture fills a GPU. Branches in one batch then save nothing, and contexts of different lengths need
# a mask, which slows fused attention down. 7B at 1024 x 1024 on an H200: 259 ms in turn, 305 in one batch; edits 440 and 525.
FILLS_A_GPU = 1024


class InTurnVelocity:
    """velocity(x_t [B, N, C], t) -> v [B, N, C] like `GuidedVelocity`, with one forward per branch, each over exactly its own context.

    This is the paper's accounting, and so the yardstick for a student's speed; slower wherever one branch does not fill the device.
    """

    def __init__(self, sessions: Sequence[Session], grids: Sequence[tuple[int, int]], settings: Denoising) -> None:
        self.settings = settings
        branches = _branches(sessions, settings)
        alone = replace(settings, text_scale=1.0)  # turns guidance off: each velocity has a single branch
        self.velocities = [
            GuidedVelocity([Session(s.parts, b.view(), b.position) for s, b in zip(sessions, group, strict=True)], grids, alone)
            for group in branches
        ]

    @property
    def evaluations(self) -> int:
        """NFE per picture so far."""
        return sum(velocity.evaluations for velocity in self.velocities)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        s = self.settings
        v = self.velocities[0](x, t)
        if len(self.velocities) == 1 or not guidance_on(t, s.interval):
            return v
        dropped = [velocity(x, t) for velocity in self.velocities[1:]]
        v_image = dropped[1] if len(dropped) > 1 else v
        return guide(v, dropped[0], v_image, s.text_scale, s.image_scale, s.renorm, s.renorm_min)


def _branches(sessions: Sequence[Session], settings: Denoising) -> list[list[Branch]]:
    """The sessions' contexts by branch, [full, text dropped, image dropped], as many of them as guidance asks for."""
    branches = [[s.full() for s in sessions]]
    if settings.text_scale > 1:
        branches.append([s.text_dropped() for s in sessions])
        if settings.image_scale > 1:
            dropped = [s.image_dropped() for s in sessions]
            # Where contexts hold nothing but given texts, dropping images changes nothing: v_image = v, for free.
            if any(b.cache is not s.cache for b, s in zip(dropped, sessions, strict=True)):
                branches.append(dropped)
    return branches


def _table_rows(grids: Sequence[tuple[int, int]], config: BagelConfig) -> Tensor:
    """Row of the position table for each latent token of each picture, [B, N]; 0 on padding."""
    own = [grid_positions(h, w, config.options.max_latent_size, config.options.interpolate_pos) for h, w in grids]
    return pad_sequence(own, batch_first=True)


def latent_grid(config: BagelConfig, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels -> in latent tokens. Raises InputError if a side is no multiple of the stride, or too large."""
    stride = config.latent_stride
    if size[0] % stride or size[1] % stride or min(size) < stride:
        near = "x".join(str(max(stride, round(side / stride) * stride)) for side in (size[1], size[0]))
        raise InputError(f"got size {size[1]}x{size[0]}, expected multiples of {stride}; the nearest is {near}")
    grid = size[0] // stride, size[1] // stride
    check_latent_grid(*grid, config.options.max_latent_size, stride)
    return grid


# Latent tokens that share a forward, padding included: those of a picture of 1024 x 1024 at 7B. Larger batches are hardly faster, but all
# of their contexts must fit into memory at once (2.3 GB for each such edit).
MOST_LATENTS = 4096


def passes(latents: Sequence[int]) -> list[list[int]]:
    """Indices of pictures of so many latent tokens each, in order, by who shares forwards. [64, 2048, 2048, 64]: [0, 1], [2, 3]."""
    parts: list[list[int]] = []
    for i in range(len(latents)):
        if parts and (len(parts[-1]) + 1) * max(latents[parts[-1][0] : i + 1]) <= MOST_LATENTS:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def in_passes(groups: Mapping[K, Sequence[int]], latents: Sequence[int]) -> Iterator[tuple[K, list[int]]]:
    """Each group's key with those of its members that share forwards; latents: of all pictures."""
    for key, group in groups.items():
        for part in passes([latents[i] for i in group]):
            yield key, [group[i] for i in part]


def draw_noise(parts: Parts, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Initial noise [h * w, C], fp32, on the CPU: the reference's draw, in token order."""
    return torch.randn(grid[0] * grid[1], parts.model.config.latent_channels, generator=generator)


@torch.inference_mode()
def denoise(
    sessions: Sequence[Session],
    grids: Sequence[tuple[int, int]],
    noises: Sequence[Tensor],
    settings: Denoising,
    on_step: OnStep | None = None,
    graphs: bool = False,
    student: StudentNetwork | None = None,
    in_turn: bool | None = None,
    kept: Sequence[Kept | None] = (),
) -> tuple[list[Tensor], int]:
    """Euler steps from noise to latents for a batch of sessions with pictures of any sizes.

    Args:
        grids: latent (rows, columns) of each picture.
        noises: [h_b * w_b, C] each.
        graphs: replay the steps as CUDA graphs (generate.graphs).
        student: denoises in the model's place.
        in_turn: one forward per guidance branch; None: where that is faster, see FILLS_A_GPU.
        kept: what each picture keeps of its source (generate.mask); () for nothing.
    Returns:
        Latents, [h_b * w_b, C] each, and the number of velocity evaluations per picture.
    """
    device = sessions[0].parts.model.device
    n = max(len(noise) for noise in noises)
    fills = device.type == "cuda" and n >= FILLS_A_GPU
    if graphs or fills:  # graphs need equal shapes at every step, and a text read in the first one brings a mask
        for session in sessions:
            session.settle()
    if in_turn is None:
        in_turn = student is None and not graphs and fills
    velocity: Any = InTurnVelocity(sessions, grids, settings) if in_turn else GuidedVelocity(sessions, grids, settings, student)
    x = pad_sequence(list(noises), batch_first=True).to(device)
    stepper: Velocity = GraphVelocity(velocity) if graphs else velocity
    if any(one is not None for one in kept):
        stepper = MaskedVelocity(stepper, kept, x)
    for k, state in euler_steps(x, stepper, time_grid(settings.num_steps, settings.shift)):
        x = state
        if on_step is not None:
            on_step(k + 1, settings.num_steps, x)
    return [row[: h * w] for row, (h, w) in zip(x, grids, strict=True)], velocity.evaluations


@torch.inference_mode()
def decode_latents(parts: Parts, latents: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Latents [h * w, C] -> a picture: decoded, (x / 2 + 1/2) clamped to [0, 1], times 255, truncated. Raises InputError if not finite."""
    z = unpatchify(latents.unsqueeze(0), *grid, parts.model.config.options.latent_patch_size)
    pixels = parts.vae.decode(z.float())[0]
    if not pixels.isfinite().all():  # clamped, they would be a black picture
        raise InputError(
            "got a picture with NaN or infinite values, expected finite ones, check the model's config files or use dtype float32"
        )
    pixels = (pixels * 0.5 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).cpu().numpy())
