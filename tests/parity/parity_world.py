"""A small random model, contexts of every kind, and drafters that know nothing or too much."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import hyperbagel
from hyperbagel.data.prompts import THINK_ANSWER
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform
from hyperbagel.generate.decode import Decoded, decode
from hyperbagel.generate.session import Parts, Session
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.config import BagelConfig, BagelOptions, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.adaptive import LATE, Adaptive
from hyperbagel.speculative.budget import Costs, DraftCost
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.folder import make_drafter, make_module
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.drafters.nobody import Nobody
from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Draft, Drafter, Seen

TOKENIZER = Path(hyperbagel.__file__).parent / "assets" / "toybox"
CONFIG = BagelConfig(
    llm=LLMConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024,
        max_position_embeddings=600,
    ),
    vit=ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=10),
    vae=VaeConfig(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=2, downsample=2),
    options=BagelOptions(max_latent_size=12, vit_max_num_patch_per_side=4, default_size=(16, 16)),
)  # fmt: skip


def make_parts(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Parts:
    """The model says im_end now and then, so that answers stop at any place."""
    torch.manual_seed(0)
    model = fresh_bagel(CONFIG, torch.Generator().manual_seed(0), std=0.3).eval()
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    with torch.no_grad():
        model.language_model.lm_head.weight[tokenizer.im_end] *= 2.5
    vae = AutoEncoder(CONFIG.vae).eval()
    return Parts(model.to(device, dtype), vae.to(device), tokenizer, ImageTransform(32, 8, 4), ImageTransform(40, 10, 10))


def large_weights(module: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Random weights, large enough that drafts vary; those of a Markov head are larger still."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weights in module.named_parameters():
            if "norm" not in name:
                weights.copy_(torch.randn(weights.shape, generator=draws) * (1.0 if name.startswith("markov") else scale))
    return module.eval().requires_grad_(False)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@torch.inference_mode()
def text_sessions(parts: Parts, n: int, seed: int = 0, taps: Sequence[int] = ()) -> list[Session]:
    """Contexts of 1 to 12 random words."""
    rng, words = random.Random(seed), ("a", "red", "blue", "car", "tree", "is", "what", "how many", "left of", "the star", "there")
    sessions = []
    for _ in range(n):
        session = Session(parts, parts.model.new_cache(taps=taps))
        session.add_text(" ".join(rng.choice(words) for _ in range(rng.randint(1, 12))))
        sessions.append(session)
    return sessions


def unlike_sessions(parts: Parts, rows: int, length: int, taps: Sequence[int] = ()) -> list[Session]:
    """Contexts whose answers, of at most `length` tokens, end at other places each, the last two long after half of them; in no order."""
    many = text_sessions(parts, 80, seed=11, taps=taps)
    by_length = {len(out.ids): i for i, out in enumerate(decode(many, max_tokens=length))}
    lengths = sorted(by_length)
    return [many[i] for i in sorted(by_length[n] for n in [*lengths[: rows - 2], *lengths[-2:]])]


@torch.inference_mode()
def mixed_sessions(parts: Parts, taps: Sequence[int] = ()) -> list[Session]:
    """After a picture, clean latents, a think prompt, thoughts, several turns, two pictures; a fork."""

    def new() -> Session:
        return Session(parts, parts.model.new_cache(taps=taps))

    picture, latents, think, turns, two = new(), new(), new(), new(), new()
    picture.add_image(photo(30, 20), latents=False)
    picture.add_text("what is this")
    latents.add_image(photo(20, 30, 1), latents=True, generator=torch.Generator().manual_seed(0))
    latents.add_text("make it red")
    think.add_text(THINK_ANSWER)
    think.add_image(photo(20, 20, 2), latents=False)
    think.add_text("how many cars")
    think.add_text("<think>two cars</think>", guided=False)
    turns.add_image(photo(20, 20, 3), latents=False)
    for text in ("is it red", "yes", "why", "it is", "where"):
        turns.add_text(text)
    two.add_image(photo(20, 20, 4), latents=True)
    two.add_text("and then")
    two.add_image(photo(16, 20, 5), latents=False)
    two.add_text("which")
    fork = turns.fork()
    fork.add_text("and now")
    return [picture, latents, think, turns, two, fork]


def same(plain: Sequence[Decoded], other: Sequence[Decoded]) -> None:
    assert [out.ids for out in other] == [out.ids for out in plain]
    assert [out.finish_reason for out in other] == [out.finish_reason for out in plain]


@contextmanager
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Collects the rows of every forward of the model."""
    found: list[int] = []
    own = Bagel.backbone

    def watched(self: Bagel, streams: Any, positions: Tensor, **how: Any) -> Any:
        found.append(positions.shape[0])
        return own(self, streams, positions, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Bagel, "backbone", watched)
        yield found


def no_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cache that takes in others finds no memory in the midst of making room."""
    own, tries = KVCache.add, list[int]()

    def add(self: KVCache, *given: Any, **how: Any) -> None:
        made = torch.Tensor.new_zeros

        def new_zeros(x: Tensor, *shape: Any) -> Tensor:
            tries.append(0)
            if len(tries) == 3:
                raise torch.OutOfMemoryError("no memory")
            return made(x, *shape)

        with monkeypatch.context() as patch:
            if len(tries) < 3:
                patch.setattr(torch.Tensor, "new_zeros", new_zeros)
            own(self, *given, **how)

    monkeypatch.setattr(KVCache, "add", add)


class Stub:
    """Knows the plain answers (`told`, im_end included where they stop) and where each row stands."""

    taps: tuple[int, ...] = ()
    width, depth, draws, threshold = 6, 6, False, 0.0

    def __init__(self, plain: Sequence[Decoded], im_end: int, vocabulary: int) -> None:
        self.told = [[*out.ids, *([im_end] if out.finish_reason == "stop" else [])] for out in plain]
        self.vocabulary = vocabulary

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.at, self.known, self.met = [0] * len(sessions), self.told[: len(sessions)], len(sessions)
        self.rng = random.Random(0)

    def ahead(self, seen: Seen, limit: int) -> list[list[int]]:
        """What each row's target will say next."""
        self.at = [at + len(ids) for at, ids in zip(self.at, seen.ids, strict=True)]
        return [told[at : at + min(limit, self.width)] for told, at in zip(self.known, self.at, strict=True)]

    def propose(self, seen: Seen, limit: int) -> Draft:
        raise NotImplementedError

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        self.at, self.known = [self.at[row] for row in rows], [self.known[row] for row in rows]

    def widen(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        new = self.told[self.met : self.met + len(sessions)]  # told in the order in which they come
        self.at, self.known, self.met = [*self.at, *[0] * len(new)], [*self.known, *new], self.met + len(new)

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing."""


def padded(rows: list[list[int]]) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.long).view(len(rows), longest)


class Echo(Stub):
    """Replays the target's own tokens."""

    def propose(self, seen: Seen, limit: int) -> Draft:
        return Draft(padded(self.ahead(seen, limit)))


class Wrong(Stub):
    """Always another token than the target's."""

    def propose(self, seen: Seen, limit: int) -> Draft:
        return Draft(padded([[(t + 1) % self.vocabulary for t in row] for row in self.ahead(seen, limit)]))


class RandomTree(Stub):
    """Another random tree each round and row; a node's token is the target's next one in half of the cases."""

    width, depth = 9, 9

    def propose(self, seen: Seen, limit: int) -> Draft:
        rows, parents = [], []
        for ahead in self.ahead(seen, limit):
            row_parents, depth, tokens = [0], [0], []
            for i in range(1, self.width + 1):
                parent = self.rng.choice([p for p in range(i) if depth[p] < limit])
                row_parents.append(parent)
                depth.append(depth[parent] + 1)
                own = ahead[depth[i] - 1] if depth[i] <= len(ahead) else 0
                tokens.append(own if self.rng.random() < 0.5 else self.rng.randrange(self.vocabulary))
            rows.append(tokens)
            parents.append(row_parents)
        return Draft(torch.tensor(rows), Tree.of(parents))


class Repeat(Stub):
    """The root, again and again."""

    def propose(self, seen: Seen, limit: int) -> Draft:
        return Draft(seen.root[:, None].expand(-1, min(limit, self.width)))


STUBS = {"echo": Echo, "wrong": Wrong, "random tree": RandomTree, "repeat": Repeat}


def drafter_of(name: str, plain: Sequence[Decoded], parts: Parts) -> Drafter:
    """A stub, or lookup, for the requests that decode to `plain`."""
    return Lookup(width=5) if name == "lookup" else STUBS[name](plain, parts.tokenizer.im_end, parts.model.config.llm.vocab_size)


class Shadow(Echo):
    """Asks another drafter every round and keeps what it drafts, by session; drafts none, one or two of the target's own tokens."""

    def __init__(self, inner: Drafter, plain: Sequence[Decoded], parts: Parts) -> None:
        super().__init__(plain, parts.tokenizer.im_end, parts.model.config.llm.vocab_size)
        self.inner, self.taps, self.width, self.im_end = inner, inner.taps, max(6, inner.width), parts.tokenizer.im_end

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        super().begin(sessions, temperature, generators)
        self.inner.begin(sessions, temperature, generators)
        self.of_row, self.drafted = list(range(len(sessions))), [list[Any]() for _ in sessions]

    def propose(self, seen: Seen, limit: int) -> Draft:
        asked = self.inner.propose(seen, self.inner.depth)
        parents = [None] * len(seen.root) if asked.tree is None else asked.tree.parents.tolist()
        for row, (i, tokens) in enumerate(zip(self.of_row, asked.tokens.tolist(), strict=True)):
            if parents[row] is None and self.im_end in tokens:  # a lone row's chain ends there
                tokens = tokens[: tokens.index(self.im_end) + 1]
            self.drafted[i].append([token for token in tokens if token >= 0] + [parents[row]])
        most = [len(self.drafted[i]) % 3 for i in self.of_row]  # by each row's own rounds
        ahead = [ids[:n] for ids, n in zip(self.ahead(seen, limit), most, strict=True)]
        return Draft(padded(ahead))

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        super().narrow(rows, counts)
        self.inner.narrow(rows, counts)
        self.of_row = [self.of_row[row] for row in rows]

    def widen(self, sessions: Sequence[Session], generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        super().widen(sessions, generators, counts)
        self.inner.widen(sessions, generators, counts)
        self.of_row = [*self.of_row, *range(len(self.drafted), len(self.drafted) + len(sessions))]
        self.drafted += [[] for _ in sessions]


KINDS: list[Kind] = ["eagle3", "hyper-bagel", "block"]
SERVED = ["lookup", *KINDS, "eagle3, tree", "block, tree"]


def served(name: str, parts: Parts) -> Drafter:
    """Lookup, or a trained kind with large random weights."""
    if name == "lookup":
        return Lookup()
    kind, _, tree = name.partition(", ")
    config = DrafterConfig.for_target(kind, parts.model.config.llm, **({"block": 4, "rank": 8} if kind == "block" else {}))  # type: ignore[arg-type]
    return make_drafter(large_weights(make_module(config), 0.3), parts.model, depth=4, nodes=9 if tree else 0)  # type: ignore[arg-type]


class Twins(Nobody):
    """Two block drafters of equal weights: one is asked every round, the other, in a budget, every third. Both must draft the same then, so
    a budget holds back the news of each row, and nobody else's. Drafts nothing. compared: the rows of each comparison."""

    width, depth = 6, 6

    def __init__(self, parts: Parts) -> None:
        self.often, self.seldom = served("block", parts), served("block", parts)
        self.budget = Adaptive({"seldom": self.seldom}, costs=Costs(((1, 1.0), (8, 1.3)), {"seldom": DraftCost(0.2, 0.05)}))
        self.taps, self.turn, self.compared = self.budget.taps, 0, list[int]()

    def begin(self, *given: Any) -> None:
        self.often.begin(*given)
        self.budget.begin(*given)

    def propose(self, seen: Seen, limit: int) -> Draft:
        self.turn += 1
        for phase in map(self.budget._phase, range(LATE + 1)):  # no trials of its own
            phase.records["seldom"].wait, phase.records["seldom"].tokens = (0 if self.turn % 3 == 0 else 9), 0.1
        theirs, mine = self.budget.propose(seen, limit), self.often.propose(seen, limit)
        if theirs.tokens.shape[1]:
            n = min(mine.tokens.shape[1], theirs.tokens.shape[1])
            alive = torch.tensor([count > 0 for count in seen.counts])
            assert torch.equal(mine.tokens[alive, :n], theirs.tokens[alive, :n])
            self.compared.append(len(seen.root))
        return super().propose(seen, limit)

    def narrow(self, *given: Any) -> None:
        self.often.narrow(*given)
        self.budget.narrow(*given)

    def widen(self, *given: Any) -> None:
        self.often.widen(*given)
        self.budget.widen(*given)
