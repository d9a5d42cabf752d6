"""Sampled speculative answers have the distribution of plain sampling, for any drafter: chi-square over whole answers, toy vocabulary."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity_world import CONFIG, make_parts

from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.session import Parts, Session
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.budget import Costs, DraftCost
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Draft, Drafter, Seen

V, LENGTH, ROWS, CALLS = 6, 3, 525, 20  # 10,500 answers of up to 3 tokens a drafter
START, END = 0, 1


class ToyTokenizer:
    im_start, im_end = START, END

    def encode(self, text: str) -> list[int]:
        return [int(c) for c in text]


class ToyStub:
    """What the sampled stubs share: the model itself, to know what is likely, and each row's tokens."""

    taps: tuple[int, ...] = ()
    width, depth, draws, threshold = 6, 6, False, 0.0

    def __init__(self, parts: Parts) -> None:
        self.best = answer_table(parts)[1]

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        self.said: list[list[int]] = [[] for _ in sessions]
        self.generators, self.rng = generators, random.Random(0)

    def news(self, seen: Seen) -> list[tuple[int, ...]]:
        for said, ids in zip(self.said, seen.ids, strict=True):
            said += ids
        return [tuple([*said, root][1:]) for said, root in zip(self.said, seen.root.tolist(), strict=True)]

    def propose(self, seen: Seen, limit: int) -> Draft:
        raise NotImplementedError

    def narrow(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        self.said, self.generators = [self.said[row] for row in rows], [self.generators[row] for row in rows]

    def end(self, counts: Sequence[int]) -> None:
        """It learns nothing."""


class LikelyChain(ToyStub):
    """The target's most likely continuation: a deterministic chain (echo). `shift` 1: never the likeliest (wrong)."""

    shift = 0

    def propose(self, seen: Seen, limit: int) -> Draft:
        rows = []
        for past in self.news(seen):
            row: list[int] = []
            while len(row) < limit:
                row.append((self.best.get((*past, *row), 2) + self.shift) % V)
            rows.append(row)
        return Draft(torch.tensor(rows))


class WrongChain(LikelyChain):
    shift = 1


class RepeatChain(ToyStub):
    def propose(self, seen: Seen, limit: int) -> Draft:
        self.news(seen)
        return Draft(seen.root[:, None].expand(-1, limit))


class FixedTree(ToyStub):
    """A random tree each round, tokens chosen without looking at the target; some siblings are equal, some nodes missing."""

    def propose(self, seen: Seen, limit: int) -> Draft:
        self.news(seen)
        rows, parents = [], []
        for _ in self.said:
            tree, depth = [0], [0]
            for i in range(1, self.width + 1):
                parent = self.rng.choice([p for p in range(i) if depth[p] < limit])
                tree.append(parent)
                depth.append(depth[parent] + 1)
            rows.append([self.rng.randrange(-1, V) for _ in tree[1:]])
            parents.append(tree)
        return Draft(torch.tensor(rows), Tree.of(parents))


class DrawnChain(ToyStub):
    """Draws a chain from distributions of its own."""

    draws = True

    def propose(self, seen: Seen, limit: int) -> Draft:
        self.news(seen)
        g = torch.Generator().manual_seed(self.rng.randrange(2**31))
        q = torch.randn(len(self.said), limit, V, generator=g).softmax(-1)
        tokens = torch.stack(
            [torch.stack([torch.multinomial(p, 1, generator=own)[0] for p in row]) for row, own in zip(q, self.generators)]
        )
        return Draft(tokens, None, q)


class DrawnTree(ToyStub):
    """Three children of the root and two of the first one, drawn without replacement."""

    draws = True

    def propose(self, seen: Seen, limit: int) -> Draft:
        self.news(seen)
        g = torch.Generator().manual_seed(self.rng.randrange(2**31))
        parents = [0, 0, 0, 0, *([1, 1] if limit > 1 else [])]
        q = torch.randn(len(self.said), len(parents), V, generator=g).softmax(-1)
        rows = []
        for p, own in zip(q, self.generators, strict=True):
            row = torch.multinomial(p[0], 3, generator=own).tolist()
            rows.append(row + (torch.multinomial(p[1], 2, generator=own).tolist() if limit > 1 else []))
        return Draft(torch.tensor(rows), Tree.of([parents] * len(rows)), q)


@pytest.fixture(scope="module")
def parts() -> Parts:
    llm = CONFIG.llm.model_copy(update={"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    model = fresh_bagel(CONFIG.model_copy(update={"llm": llm}), torch.Generator().manual_seed(5), std=0.5).eval()
    return replace(make_parts(), model=model, tokenizer=ToyTokenizer())  # type: ignore[arg-type]


@torch.inference_mode()
def context(parts: Parts) -> Session:
    session = Session.new(parts)
    session.add_text("4325")
    return session


@torch.inference_mode()
def answer_table(parts: Parts, top_p: float = 1.0) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], int]]:
    """Exact probability of every answer (END included where it stops), and the likeliest token after every prefix; temperature 1.3."""
    session, table, best = context(parts), {(): 1.0}, {}
    done: dict[tuple[int, ...], float] = {}
    for _ in range(LENGTH):
        longer = {}
        for prefix, mass in table.items():
            cache = session.cache.fork()
            ids = torch.tensor([[START, *prefix]])
            where = torch.arange(session.position, session.position + ids.shape[1])[None]
            plan = cache.plan([ids.shape[1]], causal=True)
            hidden = parts.model.backbone(Streams(parts.model.embed_text(ids), None), where, cache=cache, plan=plan).u
            assert hidden is not None
            p = (parts.model.logits(hidden[0, -1]).double() / 1.3).softmax(-1).tolist()
            best[prefix] = max(range(V), key=p.__getitem__)
            for token, chance in enumerate(kept(p, top_p)):
                (done if token == END else longer)[(*prefix, token)] = mass * chance
        table = longer
    return done | table, best


def kept(p: list[float], top_p: float) -> list[float]:
    """The nucleus of p: tokens from the likeliest on until they have `top_p` together, scaled to sum to 1."""
    chosen: list[int] = []
    for token in sorted(range(V), key=p.__getitem__, reverse=True):
        if sum(p[i] for i in chosen) < top_p:
            chosen.append(token)
    return [p[i] / sum(p[j] for j in chosen) if i in chosen else 0.0 for i in range(V)]


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """(statistic, bound that a right sampler passes with probability above 0.9999); rare answers are pooled."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    rare = {a for a, p in expected.items() if p * total < 5}
    cells = [(counts[a], p * total) for a, p in expected.items() if a not in rare]
    cells.append((sum(counts[a] for a in rare), sum(expected[a] for a in rare) * total))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells if mean > 0)
    df = len(cells) - 1
    return statistic, df * (1 - 2 / (9 * df) + 3.8 * math.sqrt(2 / (9 * df))) ** 3  # Wilson and Hilferty


def sample(parts: Parts, drafter: Drafter | None, top_p: float = 1.0) -> Counter[tuple[int, ...]]:
    counts: Counter[tuple[int, ...]] = Counter()
    sessions = [context(parts)] * ROWS
    for call in range(CALLS):
        generators = [torch.Generator().manual_seed(1_000_000 + call * ROWS + i) for i in range(ROWS)]
        how: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 1.3, "top_p": top_p, "generators": generators}
        out = plain_decode(sessions, **how) if drafter is None else decode(sessions, drafter=drafter, **how)
        counts.update((*o.ids, *([END] if o.finish_reason == "stop" else [])) for o in out)
    return counts


def budgeted(parts: Parts) -> Adaptive:
    """Good and bad drafters, chains and trees, under a budget that tries all of them and at times nobody."""
    drafters = {"likely": LikelyChain(parts), "drawn": DrawnChain(parts), "tree": DrawnTree(parts), "wrong": WrongChain(parts)}
    return Adaptive(drafters, costs=Costs(((1, 1.0), (8, 1.4)), dict.fromkeys(drafters, DraftCost(0.3))))


DRAFTERS = [None, budgeted, LikelyChain, WrongChain, RepeatChain, FixedTree, DrawnChain, DrawnTree, Lookup]


@pytest.mark.parametrize("kind", DRAFTERS, ids=[getattr(d, "__name__", "plain") for d in DRAFTERS])
def test_answers_are_distributed_as_the_targets(kind: Any, parts: Parts) -> None:
    drafter = None if kind is None else Lookup(width=3) if kind is Lookup else kind(parts)
    counts = sample(parts, drafter)
    statistic, bound = chi_square(counts, answer_table(parts)[0])
    assert sum(counts.values()) >= 10_000 and statistic < bound


@pytest.mark.parametrize("kind", [None, LikelyChain, DrawnChain, DrawnTree], ids=lambda kind: getattr(kind, "__name__", "plain"))
def test_within_a_nucleus_too(kind: Any, parts: Parts) -> None:
    """Also where drafts were drawn from outside of it."""
    counts = sample(parts, kind and kind(parts), top_p=0.7)
    expected = answer_table(parts, 0.7)[0]
    possible = {answer for answer, chance in expected.items() if chance > 0}
    statistic, bound = chi_square(counts, expected)
    assert set(counts) <= possible and 4 < len(possible) < len(expected) / 2 and statistic < bound


def test_the_chi_square_test_sees_a_wrong_sampler(parts: Parts) -> None:
    """Answers that begin with one token a quarter too often must not pass."""
    expected = answer_table(parts)[0]
    wrong = {a: p * (1.25 if a[0] == 2 else 1.0) for a, p in expected.items()}
    answers = list(itertools.islice(wrong, len(wrong)))
    drawn = random.Random(0).choices(answers, [wrong[a] for a in answers], k=10_500)
    statistic, bound = chi_square(Counter(drawn), expected)
    assert statistic > bound
