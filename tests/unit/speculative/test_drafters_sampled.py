"""Sampled answers under the real drafters have the target's distribution: what a drafter says it drew from is what it drew from.

Chi-square over whole answers of the toy target of the parity tests (six tokens). The drafters' weights are random and large: their
distributions are sharp, far from the target's and another after every token, so that a q which is only nearly right does not pass.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "parity"))
from parity_world import CONFIG, make_parts
from test_sampled_distribution import END, LENGTH, START, ToyTokenizer, V, answer_table, chi_square

from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Parts, Session
from hyperbagel.model.init import fresh_bagel
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.folder import make_drafter, make_module
from hyperbagel.speculative.types import Drafter, Seen, Speculated, Stats

TEMPERATURE, ANSWERS = 1.3, 10_500  # the temperature is that of `answer_table`
NODES, BRANCH, UNSURE = 6, 3, 0.22


@pytest.fixture(scope="module")
def parts() -> Parts:
    llm = CONFIG.llm.model_copy(update={"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    model = fresh_bagel(CONFIG.model_copy(update={"llm": llm}), torch.Generator().manual_seed(5), std=0.5).eval()
    return replace(make_parts(), model=model, tokenizer=ToyTokenizer())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(parts: Parts) -> dict[tuple[int, ...], float]:
    return answer_table(parts)[0]


@torch.no_grad()
def random_drafter(kind: Kind, parts: Parts, nodes: int = 0) -> Drafter:
    own = {"block": LENGTH, "rank": 4} if kind == "block" else {}
    module = make_module(DrafterConfig.for_target(kind, parts.model.config.llm, **own))
    g = torch.Generator().manual_seed(1)
    for name, weights in module.named_parameters():
        if "norm" not in name:
            weights.copy_(torch.randn(weights.shape, generator=g) * (1.0 if name.startswith("markov") else 0.5))
    return make_drafter(module.eval().requires_grad_(False), parts.model, depth=LENGTH, nodes=nodes, branch=BRANCH)


@torch.inference_mode()
def sample(parts: Parts, drafter: Drafter, rows: int, runner: GraphRunner | None = None) -> tuple[Counter[tuple[int, ...]], Stats]:
    """ANSWERS answers, `rows` at a time."""
    session = Session.new(parts, drafter.taps)
    session.add_text("4325")  # the context of `answer_table`
    counts: Counter[tuple[int, ...]] = Counter()
    stats = Stats()
    for turn in range(ANSWERS // rows):
        generators = [torch.Generator().manual_seed(1_000_000 + turn * rows + i) for i in range(rows)]
        how = {"temperature": TEMPERATURE, "generators": generators, "drafter": drafter, "runner": runner}
        out = decode([session] * rows, max_tokens=LENGTH, **how)  # type: ignore[arg-type]
        for row in out:
            assert isinstance(row, Speculated)
            counts[*row.ids, *([END] if row.finish_reason == "stop" else [])] += 1
            stats.add(row.stats)
    return counts, stats


@pytest.mark.parametrize("threshold", [0.0, UNSURE])
@pytest.mark.parametrize(
    ("kind", "nodes"), [("block", 0), ("block", NODES), ("eagle3", 0), ("eagle3", NODES), ("hyper-bagel", 0), ("hyper-bagel", NODES)]
)
def test_answers_are_distributed_as_the_targets(
    kind: Kind, nodes: int, threshold: float, parts: Parts, expected: dict[tuple[int, ...], float]
) -> None:
    """As they are served: blocks and trees end where they are unsure, sampled chains do not look."""
    drafter = random_drafter(kind, parts, nodes)
    drafter.threshold = threshold
    counts, stats = sample(parts, drafter, ANSWERS // 5)
    statistic, bound = chi_square(counts, expected)
    assert sum(counts.values()) == ANSWERS and statistic < bound, (statistic, bound)
    for depth in (1,) if (kind, threshold) == ("block", UNSURE) else (1, 2):  # so unsure, blocks end after a token
        assert 0 < stats.accepted[depth] < stats.tried[depth], stats


def test_so_are_answers_from_trees_in_fixed_shapes(parts: Parts, expected: dict[tuple[int, ...], float]) -> None:
    drafter, runner = random_drafter("block", parts, NODES), GraphRunner(parts.model)
    drafter.threshold = UNSURE / 4
    counts, stats = sample(parts, drafter, ANSWERS // 42, runner)
    statistic, bound = chi_square(counts, expected)
    assert sum(counts.values()) == ANSWERS and statistic < bound, (statistic, bound)
    assert 0 < stats.accepted[2] < stats.tried[2] and any(trees for read in runner.reads.values() for _, trees in read.runs)


@torch.inference_mode()
def test_a_sampled_block_ends_before_it_looks_at_the_draw(parts: Parts) -> None:
    """Whether a token is drafted depends on those before it alone, else unlikely ones would be left out and answers bent.

    A lone row, many draws: after equal tokens a draft always ends or always goes on, so no draft is the beginning of another.
    """
    drafter = random_drafter("block", parts)
    drafter.threshold = 0.18
    session = Session.new(parts, drafter.taps)
    session.add_text("4325")
    root, position = torch.tensor([START]), torch.tensor([session.position])
    drafts = set()
    for seed in range(200):
        drafter.begin([session], TEMPERATURE, [torch.Generator().manual_seed(seed)])
        drafts.add(tuple(drafter.propose(Seen(session.cache, [0], session.cache.lengths, [[]], root, position), LENGTH).tokens[0].tolist()))
    lengths = {len(draft) for draft in drafts if draft[-1:] != (END,)}
    assert lengths == {1, 2, 3}
    assert not any(a != b and a == b[: len(a)] for a in drafts for b in drafts)
