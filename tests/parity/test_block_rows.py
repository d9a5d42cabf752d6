"""How a block drafter serves rows of other lengths together. Its weights are random and large."""

from __future__ import annotations

import pytest
import torch
from parity_world import CONFIG, large_weights, make_parts, text_sessions
from torch import Tensor

from hyperbagel.generate.session import Parts, Session
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.decode import verify_forward
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.config import DrafterConfig
from hyperbagel.speculative.drafters.folder import make_module
from hyperbagel.speculative.drafters.layers import Served, Sight
from hyperbagel.speculative.drafters.serve_blocks import BlockProposer, block_plan
from hyperbagel.speculative.types import Seen

DEPTH = 4


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


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
