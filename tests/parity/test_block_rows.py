"""How a block drafter serves rows of other lengths together. Its weights are random and large."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from parity_world import CONFIG, large_weights, text_sessions
from torch import Tensor

from hyperbagel.generate.session import Parts, Session
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.decode import verify_forward
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.folder import make_module
from hyperbagel.speculative.drafters.layers import Served, Sight
from hyperbagel.speculative.drafters.serve_blocks import BlockProposer, block_plan
from hyperbagel.speculative.types import Draft, Seen

DEPTH = 4


@pytest.fixture(scope="module")
def module() -> BlockDrafter:
    made = make_module(DrafterConfig.for_target("block", CONFIG.llm, block=DEPTH, rank=8))
    assert isinstance(made, BlockDrafter)
    large_weights(made, 0.3)
    return made


def mixed(parts: Parts, module: BlockDrafter) -> list[Session]:
    """Three contexts of other lengths."""
    taps = tuple(sorted(set(module.layers_read)))
    return list({session.cache.lengths[0]: session for session in text_sessions(parts, 12, taps=taps)}.values())[:3]


@torch.inference_mode()
def test_rows_of_other_lengths_draft_as_they_do_alone(module: BlockDrafter, parts: Parts) -> None:
    """Two rounds of a block: three contexts of other lengths, of which then 3, 1 and 2 slots are new."""
    sessions, accepted = mixed(parts, module), [3, 1, 2]
    assert len({session.cache.lengths[0] for session in sessions}) == 3
    tokens = torch.randint(0, 900, (3, 3), generator=torch.Generator().manual_seed(0))

    def rounds(rows: list[int]) -> list[Tensor]:
        """What the rows drew from, after each of two rounds: [rows, K, V]."""
        chosen, proposer = [sessions[row] for row in rows], BlockProposer(module, parts.model)
        cache = KVCache.stack([session.cache for session in chosen], 16, taps=chosen[0].cache.taps)
        position = torch.tensor([session.position for session in chosen])
        proposer.begin(chosen, 1.0, ())
        root, lengths, found = torch.full((len(rows),), parts.tokenizer.im_start), list(cache.lengths), []
        for start, counts in (([0] * len(rows), lengths), (lengths, [accepted[row] for row in rows])):
            if start is lengths:
                verify_forward(parts.model, cache, tokens[rows], None, position)
                position, root = position + torch.tensor(counts), root + 5
            proposer.generators = [torch.Generator().manual_seed(row) for row in rows]
            draft = proposer.propose(Seen(cache, start, counts, [[]] * len(rows), root, position), DEPTH)
            assert draft.q is not None
            found.append(draft.q)
        return found

    for together, *alone in zip(rounds([0, 1, 2]), *(rounds([row]) for row in range(3)), strict=True):
        for row, own in enumerate(alone):  # alone a draft ends where it says that the answer does
            torch.testing.assert_close(together[row, : own.shape[1]], own[0], atol=1e-5, rtol=1e-4)


def test_no_two_tokens_of_a_row_share_a_slot() -> None:
    """Padding neither: which of two would stay is not defined."""
    cache = KVCache(1, 1, 2, rows=3, device="cpu", dtype=torch.float32)
    cache.reserve(64)
    cache.advance([5, 9, 7])
    plan = block_plan(cache, [3, 1, 0], DEPTH)
    assert isinstance(plan.slots, Tensor) and plan.slots.shape == (3, 3 + DEPTH) and int(plan.slots.max()) < cache.capacity
    assert all(len(set(row)) == len(row) for row in plan.slots.tolist())
    assert [row[-DEPTH:] for row in plan.slots.tolist()] == [list(range(end, end + DEPTH)) for end in (8, 10, 7)]


@pytest.mark.parametrize("kept", [2, 40])
@torch.inference_mode()
def test_tokens_beside_leave_keys_and_values_as_if_they_were_asked_too(module: BlockDrafter, kept: int) -> None:
    """Few of them are asked along, many are not: the same outputs and the same memory as one pass over all."""
    attention, config = module.layers[0].self_attn, module.config
    beside, x = torch.randn(2, 2 + DEPTH, config.hidden_size, generator=torch.Generator().manual_seed(6)).split([2, DEPTH], dim=1)
    beside = torch.cat([beside] * (kept // 2), dim=1)
    found = []
    for together in (True, False):
        cache = KVCache(1, config.kv_heads, config.head_dim, rows=2, device="cpu", dtype=torch.float32)
        memory = Served(cache, cache.plan([kept + DEPTH] * 2, causal=True))
        sight = Sight.at(torch.arange(kept + DEPTH).expand(2, -1), config, torch.float32, memory)
        given = (torch.cat([beside, x], dim=1), None) if together else (x, beside)
        found.append((attention(given[0], sight, 0, given[1])[:, -DEPTH:], cache.k[0], cache.v[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@torch.inference_mode()
def tree_of(
    chances: Sequence[Sequence[float]],
    temperature: float,
    parts: Parts,
    module: BlockDrafter,
    finished: Sequence[int] = (),
    nodes: int = 6,
    then: Sequence[float] = (),
    fixed: bool = False,
) -> Draft:
    """Trees at a threshold of 0.3 from rows of these chances (at T = 1), followed by those of `then`, if any, after every token. fixed: as
    a request with graphs begins."""
    sessions = mixed(parts, module)[: len(chances)]
    proposer = BlockProposer(module, parts.model, threshold=0.3, nodes=nodes, branch=len(chances[0]))
    proposer.begin(sessions, temperature, ())
    proposer.table, proposer.links = None, torch.zeros(module.config.vocab_size, len(chances[0]))
    proposer._link_of = lambda token: proposer.links[token].numpy()  # type: ignore[index, method-assign]
    depths = [list(chances), *([[then] * len(chances)] if then else [])]
    proposer._block = lambda *_: (torch.tensor(depths).log().transpose(0, 1), torch.empty(0))  # type: ignore[method-assign]
    cache = KVCache.stack([session.cache for session in sessions], 16, taps=sessions[0].cache.taps)
    counts = [0 if row in finished else n for row, n in enumerate(cache.lengths)]
    root, position = torch.zeros(len(counts), dtype=torch.long), torch.tensor([session.position for session in sessions])
    proposer.cache = proposer.new_cache(len(counts), 64)
    read = object() if fixed else None
    return proposer._propose(Seen(cache, [0] * len(counts), counts, [[]] * len(counts), root, position, read), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("fixed", [False, True])
def test_a_hot_target_spreads_a_tree(fixed: bool, module: BlockDrafter, parts: Parts) -> None:
    """Of two nodes the second is the child where its path is likelier, 0.6 x 0.9 to 0.4, and the sibling at T = 3, 0.53 x 0.68 to 0.47. At
    T = 0.5 the other row's child would be the likelier one, 0.6 x 0.84 to 0.4, but cold targets are taken for lukewarm ones."""
    for chances, then, child_at in (([0.6, 0.4], [0.9, 0.1], {0.0, 0.5, 1.0}), ([0.55, 0.45], [0.7, 0.3], set())):
        for temperature in (0.0, 0.5, 1.0, 3.0):
            draft = tree_of([chances], temperature, parts, module, nodes=2, then=then, fixed=fixed)
            assert draft.tokens.tolist() == [[0, 0] if temperature in child_at else [0, 1]]


def test_a_hot_target_spreads_a_tree_and_a_cold_one_does_not_narrow_it(module: BlockDrafter, parts: Parts) -> None:
    """At T = 0.5 the first row's chances would be 0.8, 0.2 and 0.02. At T = 3 the second's are 0.52, 0.31 and 0.17."""
    for chances, found in (([0.595, 0.305, 0.1], {0.0: 2, 0.5: 2, 1.0: 2, 50.0: 3}), ([0.8, 0.17, 0.03], {0.0: 1, 1.0: 1, 3.0: 2})):
        for temperature, nodes in found.items():
            assert tree_of([chances], temperature, parts, module).tokens.tolist() == [list(range(nodes))]


def test_what_one_row_hardly_needs_is_drafted_where_it_pays_in_the_mean(module: BlockDrafter, parts: Parts) -> None:
    """Second nodes of chances 0.24 and 0.4: 0.32 in the mean, so both are there; third ones are not."""
    draft = tree_of([[0.7, 0.24, 0.06], [0.45, 0.4, 0.15]], 0.0, parts, module)
    assert draft.tokens.tolist() == [[0, 1], [0, 1]]


def test_a_finished_row_needs_no_tree(module: BlockDrafter, parts: Parts) -> None:
    """Neither has it nodes, nor do its chances count in the mean."""
    draft = tree_of([[0.55, 0.35, 0.1], [0.98, 0.01, 0.01]], 0.0, parts, module, finished=[1])
    assert draft.tokens.tolist() == [[0, 1], [-1, -1]]
    assert tree_of([[0.55, 0.35, 0.1], [0.98, 0.01, 0.01]], 0.0, parts, module).tokens.tolist() == [[0], [0]]
