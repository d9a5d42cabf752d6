"""Trains a drafter for a frozen target: contexts come from the recipe's data, the target itself answers them, features are taken online.

Batches are a pure function of step and rank: a pool of contexts is answered together, cut into batches and used `passes` times.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hyperbagel.core.config import Config, check_weights
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_text
from hyperbagel.data.loader import count_broken, read_group
from hyperbagel.data.mixture import SourceConfig, build_source
from hyperbagel.data.transforms import InTurn
from hyperbagel.generate.decode import Decoded, decode
from hyperbagel.generate.session import Parts, Session
from hyperbagel.speculative.decode import decode as speculate
from hyperbagel.speculative.drafters.autoregressive import Lesson
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.eagle3 import Eagle3
from hyperbagel.speculative.drafters.export import export_eagle3
from hyperbagel.speculative.drafters.folder import load_module, make_drafter, make_module, save_drafter, write_acceptance
from hyperbagel.speculative.drafters.lesson import make_lesson
from hyperbagel.speculative.drafters.regenerate import context_of
from hyperbagel.speculative.simulate import simulate
from hyperbagel.speculative.types import Drafter, Speculated, Stats
from hyperbagel.train.batches import warn_of_repeats
from hyperbagel.train.distributed import World, join_world
from hyperbagel.train.frozen import FrozenRecipe, codes_of
from hyperbagel.train.losses.drafter import block_loss, unrolled_loss
from hyperbagel.train.optim import OptimConfig
from hyperbagel.train.stage import HELD_OUT_SEED, Draws, Player, Stage

_POOL = 7  # key of the pools' generators
GATE = 0.02  # how far the engine's tau may differ from the simulated one, as a share


class GateFailed(InputError):
    """The engine's acceptance is not what training simulated: training and serving differ."""


Temperature = Annotated[float, Field(ge=0, le=100)]


class PromptConfig(Config):
    """Where contexts come from: sources as in any stage, drawn by weight. An answer in a sample only marks where the target answers."""

    sources: dict[str, SourceConfig]
    weights: dict[str, float] = Field(default_factory=dict)  # empty: equal

    @model_validator(mode="after")
    def _can_draw(self) -> PromptConfig:
        if not self.sources:
            raise ValueError("got no sources, expected at least one")
        check_weights(self.weights or None, self.sources, "sources")
        return self

    def share(self) -> tuple[list[str], list[float]]:
        names = list(self.sources)
        return names, [self.weights.get(name, 0.0) if self.weights else 1.0 for name in names]


class Recipe(FrozenRecipe):
    """Settings of the stage "drafter"."""

    target: Path  # a folder in BAGEL's layout
    init: Path | None = None  # a drafter to start from, of the same kind and shape; None: a new one
    kind: Kind = "hyper-bagel"
    shape: dict[str, Any] = Field(default_factory=dict)  # a kind's own settings: layers, zero_init, block, rank, draft_vocab
    data: PromptConfig
    held_out: dict[str, PromptConfig] = Field(default_factory=dict)  # name of a split -> contexts that are measured
    held_out_prompts: int = Field(default=32, ge=1)
    pool: int = Field(default=64, ge=1)  # contexts answered together
    contexts: int = Field(default=16, ge=1)  # per batch
    passes: int = Field(default=2, ge=1)  # how often a pool is used
    temperatures: tuple[Temperature, ...] = Field(default=(0.0, 1.0), min_length=1)  # of the target's answers, pools taking turns
    max_tokens: int = Field(default=160, ge=2)
    steps: int = Field(default=5, ge=1)  # of training-time test
    anchors: int = Field(default=12, ge=1)  # kind block: blocks per answer
    ce_weight: float = Field(default=0.1, ge=0)
    decay: float = Field(default=0.8, gt=0, le=1)
    depth: int = Field(default=7, ge=1)  # of the drafts that are measured
    tree_nodes: int = Field(default=16, ge=0)  # of the tree that is measured; 0: none
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    optim: OptimConfig = OptimConfig(lr=1e-3, ema_decay=0.999, clip=0.5)

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.accumulate != 1:
            raise ValueError(f"accumulate: got {self.accumulate}, expected 1 in this stage; raise contexts instead")
        if self.contexts > self.pool:
            raise ValueError(f"contexts: got {self.contexts}, expected at most pool {self.pool}")
        return self


@dataclass(frozen=True)
class DraftBatch:
    lesson: Lesson
    anchors: Tensor  # [B, A]; for kind block


class DrafterStage(Stage):
    """One player, "drafter". The target is not trained and is in no checkpoint."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device, self.world = recipe, device, join_world(device)
        self.parts = Parts.load(recipe.target, device, target_dtype(recipe.precision, device), codes=codes_of(recipe, device))
        self.target = self.parts.model.requires_grad_(False)
        config = DrafterConfig.for_target(recipe.kind, self.target.config.llm, **recipe.shape)
        self.module = make_module(config).to(device)
        self.module.init_from(self.target, torch.Generator().manual_seed(recipe.seed))
        if recipe.init is not None:
            self._go_on_from(recipe.init, config)
        self.taps = tuple(sorted({0, *self.module.layers_read}))
        self.players = {"drafter": Player.of(self.module, recipe.optim, ramp=recipe.init is None)}
        self.broken: Counter[str] = Counter()  # rows skipped by this process, by source
        self.sources = _sources(recipe.data, self.parts, recipe.seed)
        self.best_metric = f"{next(iter(recipe.held_out))}_tau" if recipe.held_out else None
        self.asked: tuple[int, list[Session]] | None = None  # (number, contexts) of the current pools
        self.pool: tuple[int, list[Lesson]] | None = None  # (number, batches) of the current pool
        self.left_out = 0  # batches that gave no finite loss
        # rank 0 measures, for all
        self.measured = {name: self._prompts(data) for name, data in recipe.held_out.items()} if self.world.leads else {}
        if isinstance(self.module, Eagle3) and config.draft_vocab is not None and recipe.init is None:
            self._choose_vocabulary(self.module, config.draft_vocab)

    def _go_on_from(self, folder: Path, config: DrafterConfig) -> None:
        """Start from the weights of a trained drafter. Raises InputError if it is not of the recipe's kind and shape."""
        given = load_module(folder, self.target)
        if given.config != config:
            own = config.model_dump()
            other = [f"{k} {v}, expected {own.get(k)}" for k, v in given.config.model_dump().items() if v != own.get(k)]
            raise InputError(f"init={folder}: got a drafter with {'; '.join(other)}; set kind and shape as it was made")
        self.module.load_state_dict({name: x.float() if x.is_floating_point() else x for name, x in given.state_dict().items()})

    # -- data ------------------------------------------------------------------------------------------------------------------

    def _contexts(
        self, data: PromptConfig, sources: dict[str, Any], first: int, n: int, rng: random.Random, world: World | None = None
    ) -> list[Session]:
        """n contexts from the stream, beginning at index `first`. Index i of the stream is index i of the source that is drawn for it (with
        `world`, of this rank's part of it)."""
        rank, ranks = (world.rank, world.size) if world else (0, 1)
        names, weights = data.share()
        found: list[Session] = []
        index = first
        while len(found) < n:
            name = rng.choices(names, weights)[0]
            group = read_group(sources[name], name, index, 1, rank, ranks)
            count_broken(self.broken, group)
            session = context_of(self.parts, group.samples[0], self.taps)
            index += 1
            if session is not None:
                found.append(session)
            elif index - first > 50 * n + 1000:
                raise InputError(f"data: got {index - first} samples with {len(found)} answers, expected one in most, use question sources")
        return found

    def _answer(self, sessions: Sequence[Session], temperature: float, rng: random.Random) -> list[tuple[Session, Decoded]]:
        generators = [torch.Generator().manual_seed(rng.randrange(2**62)) for _ in sessions]
        out = decode(sessions, max_tokens=self.recipe.max_tokens, temperature=temperature, generators=generators)
        return list(zip(sessions, out, strict=True))

    def _prompts(self, data: PromptConfig) -> list[tuple[Session, Decoded]]:
        """Held-out contexts with the target's greedy answers."""
        rng = random.Random(HELD_OUT_SEED)
        sources = _sources(data, self.parts, HELD_OUT_SEED)
        warn_of_repeats(sources, self.recipe.held_out_prompts, "held_out_prompts")
        return self._answer(self._contexts(data, sources, 0, self.recipe.held_out_prompts, rng), 0.0, rng)

    def batch(self, step: int, rng: Draws) -> DraftBatch:
        r = self.recipe
        cuts = r.pool // r.contexts
        number, within = divmod(step + self.left_out, cuts * r.passes)
        if self.pool is None or self.pool[0] != number:
            self.pool = None  # freed before the next one is made: memory would have to hold two
            self.pool = number, self._pool(number)
        lesson = self.pool[1][within % cuts]
        spread = torch.rand(len(lesson.counts), r.anchors, generator=rng.torch).to(self.device)
        return DraftBatch(lesson, (spread * lesson.counts[:, None]).long())

    def refuse(self) -> None:
        self.left_out += 1

    def state(self) -> dict[str, Any]:
        return {"left_out": self.left_out} if self.left_out else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self.left_out = state.get("left_out", 0)

    @torch.no_grad()
    def _pool(self, number: int) -> list[Lesson]:
        """The batches of pool `number`. Successive pools, one for each temperature, share their contexts."""
        r = self.recipe
        of, turn = divmod(number, len(r.temperatures))
        if self.asked is None or self.asked[0] != of:
            draws = Draws.at(r.seed, _POOL, of, 0, self.world.rank).python
            self.asked = of, self._contexts(r.data, self.sources, of * r.pool, r.pool, draws, self.world)
        answered = self._answer(self.asked[1], r.temperatures[turn], Draws.at(r.seed, _POOL, number, 1, self.world.rank).python)
        answered.sort(key=lambda pair: len(pair[1].ids))  # similar lengths together: little padding
        return [self._lesson(answered[at : at + r.contexts]) for at in range(0, r.pool - r.contexts + 1, r.contexts)]

    def _lesson(self, pairs: Sequence[tuple[Session, Decoded]]) -> Lesson:
        return make_lesson([s for s, _ in pairs], [out.ids for _, out in pairs], self.module.layers_read)

    def _choose_vocabulary(self, module: Eagle3, size: int) -> None:
        """Let the drafter draft the `size` most frequent tokens of the target's own answers; ties and unseen tokens in order of id."""
        seen = torch.zeros(self.target.config.llm.vocab_size)
        for number in range(4):
            for lesson in self._pool(number):
                for row, count in zip(lesson.tokens, lesson.counts.tolist(), strict=True):
                    ids = torch.cat([row[1:count].cpu(), torch.tensor([self.parts.tokenizer.im_end])])
                    seen += torch.bincount(ids, minlength=len(seen))
        module.set_vocabulary(seen.argsort(descending=True, stable=True)[:size].sort().values.to(self.device))
        module.lm_head.weight.data.copy_(self.target.language_model.lm_head.weight.data[module.drafted()])

    # -- training --------------------------------------------------------------------------------------------------------------

    def loss(self, player: str, batch: DraftBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        r, module = self.recipe, self.module
        if isinstance(module, BlockDrafter):
            logits, confidence = module.rollout(batch.lesson, self.target.embed_text, batch.anchors)
            return block_loss(logits, confidence, batch.anchors, batch.lesson, ce_weight=r.ce_weight, tv_weight=1 - r.ce_weight)
        outs = module.rollout(batch.lesson, self.target.embed_text, r.steps)
        return unrolled_loss(outs, batch.lesson, ce_weight=r.ce_weight, decay=r.decay)

    # -- figures ---------------------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict[str, float]:
        """For each split: the simulated tau of a greedy chain, its acceptance by depth, and the tau of a tree (by the engine, since trees
        are not simulated)."""
        found: dict[str, float] = {}
        with self.served():
            for name, pairs in self.measured.items():
                stats = self.simulated(pairs)
                found[f"{name}_tau"] = stats.tau
                found |= {f"{name}_rate_{i + 1}": rate for i, rate in enumerate(stats.rates())}
                if self.recipe.tree_nodes:
                    tree = make_drafter(self.module, self.target, depth=self.recipe.depth, nodes=self.recipe.tree_nodes)
                    found[f"{name}_tree_tau"] = self.engine(pairs, tree).tau
        if skipped := sum(self.broken.values()):
            found["skipped_rows"] = skipped
        return found

    @contextmanager
    def served(self) -> Iterator[None]:
        """Inside, `module` is the averaged drafter in the target's dtype, as an engine loads it."""
        trained = self.module
        with self.players["drafter"].averaged(), torch.no_grad():
            try:
                if self.target.dtype != torch.float32:
                    self.module = deepcopy(trained).to(self.target.dtype)
                yield
            finally:
                self.module = trained

    def simulated(self, pairs: Sequence[tuple[Session, Decoded]]) -> Stats:
        """The rounds of a greedy chain, simulated from teacher-forced logits; as many prompts at once as training has contexts."""
        rows: list[Stats] = []
        for some in parts_of(pairs, self.recipe.contexts):
            lesson = self._lesson(some)
            stopped = torch.tensor([out.finish_reason == "stop" for _, out in some], device=self.device)
            rows += simulate(self._right(lesson), lesson.counts - 1 + stopped.long())
        return pooled(rows)

    def _right(self, lesson: Lesson) -> Tensor:
        """bool [B, R, K]: whether the draft of depth k + 1 from the root at entry i is the target's choice."""
        r = lesson.tokens.shape[1]
        depth = self.recipe.depth
        best = torch.stack([(lesson.logits.roll(-k, dims=1)).argmax(-1) for k in range(depth)], dim=-1)  # [B, R, K]
        if isinstance(self.module, BlockDrafter):
            depth = min(depth, self.module.config.block)
            anchors = torch.arange(r, device=self.device).expand(len(lesson.tokens), -1)
            drafts = self.module.rollout(lesson, self.target.embed_text, anchors)[0].argmax(-1)[..., :depth]
        else:
            drafts = torch.stack([out.argmax(-1) for out in self.module.rollout(lesson, self.target.embed_text, depth)], dim=-1)
        valid = torch.stack([lesson.valid(k) for k in range(depth)], dim=-1)
        return (drafts == best[..., :depth]) & valid

    def engine(self, pairs: Sequence[tuple[Session, Decoded]], drafter: Drafter) -> Stats:
        """What serving measures on the same prompts."""
        out = [
            row
            for some in parts_of(pairs, self.recipe.contexts)
            for row in speculate([s for s, _ in some], max_tokens=self.recipe.max_tokens, drafter=drafter)
        ]
        return pooled([row.stats for row in out if isinstance(row, Speculated)])

    def finish(self, out: Path) -> None:
        """export/ (and export-eagle3/ for that kind) with averaged weights; then the gate: the engine's tau must be within 2 % of the
        simulated one. Raises GateFailed if it is not, after everything is written.
        """
        dtype = getattr(torch, self.recipe.export_dtype)
        with self.players["drafter"].averaged():
            save_drafter(out / "export", self.module, dtype)
            if isinstance(self.module, Eagle3):
                export_eagle3(out / "export-eagle3", self.module, self.target.config.llm, dtype)
        with self.served():
            gate: dict[str, Any] = {}
            for name, pairs in self.measured.items():
                told = self.simulated(pairs)
                got = self.engine(pairs, make_drafter(self.module, self.target, depth=self.recipe.depth))
                gate[name] = {"simulated_tau": told.tau, "engine_tau": got.tau, "simulated": told.rates(), "engine": got.rates()}
            write_acceptance(out / "export", {name: g["simulated"] for name, g in gate.items()})
        far = [name for name, g in gate.items() if not math.isclose(g["engine_tau"], g["simulated_tau"], rel_tol=GATE)]
        told_in = out / ("gate-failed.json" if far else "gate.json")  # gate.json says that a run is finished and may be passed on
        atomic_write_text(told_in, json.dumps(gate, indent=1) + "\n")
        if far:
            name = far[0]
            raise GateFailed(
                f"{told_in}: on {name!r} got tau {gate[name]['engine_tau']:.3f} from the engine, expected the simulated "
                f"{gate[name]['simulated_tau']:.3f} within {GATE:.0%}; the weights are written, but training and serving differ"
            )


def target_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype in which the target answers: the one it is served in (bf16 on a GPU, fp32 on a CPU), unless the recipe names one."""
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and device.type == "cuda") else torch.float32


def parts_of(pairs: Sequence[tuple[Session, Decoded]], size: int) -> Iterator[Sequence[tuple[Session, Decoded]]]:
    """Slices of at most `size`, in order."""
    return (pairs[at : at + size] for at in range(0, len(pairs), size))


def pooled(rows: Sequence[Stats]) -> Stats:
    """The statistics of all rows together."""
    total = Stats()
    for row in rows:
        total.add(row)
    return total


def _sources(data: PromptConfig, parts: Parts, seed: int) -> dict[str, Any]:
    vae = parts.vae_transform
    vit = InTurn(vae, parts.vit_transform)  # as a session reads pictures: at 7B one of 336 x 336 has 1,369 patches, not 576
    return {name: build_source(name, config, parts.tokenizer, vae, vit, seed) for name, config in data.sources.items()}


def build(recipe: Recipe, device: torch.device) -> DrafterStage:
    """The stage's entry point, called by name."""
    return DrafterStage(recipe, device)
