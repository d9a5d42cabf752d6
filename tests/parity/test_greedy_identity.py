"""Greedy speculative answers are the plain ones, token for token, for any drafter, after any context."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from parity_world import STUBS, Echo, drafter_of, mixed_sessions, same, text_sessions

from hyperbagel.core.errors import InputError
from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Parts, Session
from hyperbagel.model.qwen2_mot import Streams
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.compare import first_divergence
from hyperbagel.speculative.decode import Rounds, decode, verify_forward
from hyperbagel.speculative.drafters.lookup import NGrams
from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Speculated

PROMPTS, BATCH, LENGTH = 1000, 125, 12


@pytest.fixture(scope="module")
def batches(parts: Parts) -> list[tuple[list[Session], list[Decoded]]]:
    sessions = text_sessions(parts, PROMPTS)
    groups = [sessions[i : i + BATCH] for i in range(0, PROMPTS, BATCH)]
    return [(group, plain_decode(group, max_tokens=LENGTH)) for group in groups]


@pytest.mark.parametrize("name", [*STUBS, "lookup"])
def test_a_thousand_prompts(name: str, batches, parts: Parts) -> None:
    reasons, rounds, tokens = set(), 0, 0
    for sessions, plain in batches:
        out = decode(sessions, max_tokens=LENGTH, drafter=drafter_of(name, plain, parts))
        same(plain, out)
        reasons |= {o.finish_reason for o in out}
        for row in out:
            assert isinstance(row, Speculated)
            rounds, tokens = rounds + row.stats.rounds, tokens + row.stats.tokens
    assert reasons == {"stop", "length"}  # stops inside runs and cuts at max_tokens both occurred
    if name == "echo":
        assert tokens / rounds > 4
    if name == "wrong":
        assert tokens == rounds
    if name == "random tree":
        assert 1.2 < tokens / rounds < 5


@pytest.mark.parametrize("name", [*STUBS, "lookup"])
def test_after_any_context_alone_and_together(name: str, parts: Parts) -> None:
    sessions = mixed_sessions(parts)
    before = [(s.cache.lengths[0], s.position, [k[:, :, : s.cache.lengths[0]].clone() for k in s.cache.k]) for s in sessions]
    plain = plain_decode(sessions, max_tokens=20)
    same(plain, decode(sessions, max_tokens=20, drafter=drafter_of(name, plain, parts)))
    for session, told in zip(sessions, plain, strict=True):
        same([told], decode([session], max_tokens=20, drafter=drafter_of(name, [told], parts)))
    for session, (length, position, keys) in zip(sessions, before, strict=True):  # sessions and forks stay as they were
        assert (session.cache.lengths[0], session.position) == (length, position)
        assert all(torch.equal(a[:, :, :length], b) for a, b in zip(session.cache.k, keys, strict=True))


@pytest.mark.parametrize("name", ["echo", "random tree"])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_length_limit_logits_and_stream(name: str, length: int, parts: Parts) -> None:
    sessions = text_sessions(parts, 12, seed=1)
    plain_stream: dict[int, list[int]] = {}
    stream: dict[int, list[int]] = {}
    plain = plain_decode(sessions, max_tokens=length, keep_logits=True, on_token=lambda b, t: plain_stream.setdefault(b, []).append(t))
    drafter = drafter_of(name, plain, parts)
    out = decode(sessions, max_tokens=length, keep_logits=True, drafter=drafter, on_token=lambda b, t: stream.setdefault(b, []).append(t))
    same(plain, out)
    assert stream == plain_stream == {b: o.ids for b, o in enumerate(plain) if o.ids}
    for a, b in zip(plain, out, strict=True):
        torch.testing.assert_close(torch.stack(b.logits), torch.stack(a.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*STUBS, "lookup"])
@torch.inference_mode()
def test_cache_after_every_round_equals_a_fresh_prefill(name: str, parts: Parts) -> None:
    """Keys, values, positions and tapped features."""
    taps = (0, 2, 5)
    sessions = mixed_sessions(parts, taps)
    plain = plain_decode(sessions, max_tokens=16)
    model = parts.model
    work = Rounds(sessions, 16, 0.0, (), None, False, drafter_of(name, plain, parts))
    committed: list[list[int]] = [[] for _ in sessions]
    while work.alive:
        work.round()
        for b, i in enumerate(work.of_row):  # finished rows leave
            session = sessions[i]
            committed[i] += work.ids[b]
            fresh = session.cache.fork()
            n, length = len(committed[i]), session.cache.lengths[0]
            assert work.cache.lengths[b] == length + n
            if n:
                where = torch.arange(session.position, session.position + n)[None]
                u = model.embed_text(torch.tensor([committed[i]]))
                model.backbone(Streams(u, None), where, cache=fresh, plan=fresh.plan([n], causal=True))
            for mine, theirs in zip(work.cache._stores(), fresh._stores(), strict=True):
                for x, y in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(x[b, :, : length + n], y[0, :, : length + n], atol=2e-4, rtol=2e-4)


def test_where_answers_part_is_told(parts: Parts) -> None:
    """Index and gap; in bf16 they do part (tests/parity/test_trained_kinds.py)."""
    [plain] = plain_decode(text_sessions(parts, 1, seed=2), max_tokens=10, keep_logits=True)
    for index in (0, 3):
        parted = first_divergence(plain, Decoded([t + (i >= index) for i, t in enumerate(plain.ids)], plain.finish_reason))
        best, second = plain.logits[index].topk(2).values.tolist()
        assert parted is not None and parted.index == index and parted.gap == pytest.approx(best - second)
    assert first_divergence(plain, plain) is None


def test_contexts_without_the_features_are_refused(parts: Parts) -> None:
    sessions = text_sessions(parts, 2)
    drafter = Echo([Decoded([1]), Decoded([1])], 0, 1024)
    drafter.taps = (0, 3)
    with pytest.raises(InputError, match=r"layers \[0, 3\]"):
        decode(sessions, max_tokens=3, drafter=drafter)


def slowly(ids: Sequence[int], most: int, longest: int, shortest: int) -> list[int]:
    """What follows the latest earlier occurrence of the longest end, found by going through the whole text."""
    for size in range(min(longest, len(ids) - 1), shortest - 1, -1):
        for at in range(len(ids) - size - 1, -1, -1):
            if ids[at : at + size] == ids[-size:]:
                out = list(ids[at + size : at + size + most])
                while len(out) < most:
                    out.append([*ids, *out][at + size + len(out)])
                return out
    return []


def test_lookup_continues_the_latest_longest_match() -> None:
    def found(ids: list[int], most: int, longest: int = 3, shortest: int = 1) -> list[int]:
        return NGrams(ids[:-1], longest, shortest).continuation(ids[-1], most)

    assert found([1, 2, 3, 9, 1, 2, 3, 7, 5, 2, 3], 2) == [7, 5]
    assert found([1, 2, 3, 9, 5, 2, 3, 7, 1, 2, 3], 2) == [9, 5]
    assert found([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert found([1, 2, 3], 4) == []
    assert found([4, 1, 4], 4, shortest=2) == []
    rng = random.Random(0)
    for _ in range(3000):
        ids = [rng.randrange(3) for _ in range(rng.randrange(1, 14))]
        shortest = rng.randint(1, 2)
        longest, most, cut = rng.randint(shortest, 4), rng.randint(0, 6), rng.randrange(len(ids))
        grown = NGrams(ids[:cut], longest, shortest)
        grown.extend(ids[cut:-1])
        assert grown.continuation(ids[-1], most) == slowly(ids, most, longest, shortest)


@pytest.mark.parametrize("name", [*STUBS, "lookup"])
def test_drafts_read_in_fixed_shapes(name: str, parts: Parts) -> None:
    """The steps that a GPU replays, run as they are: batches of unlike contexts and lone ones, one runner for all."""
    runner, sessions = GraphRunner(parts.model), mixed_sessions(parts)
    before = [(s.cache.lengths[0], s.position) for s in sessions]
    for group in (sessions, sessions[:1], sessions[::-1], sessions[1:2]):
        plain = plain_decode(group, max_tokens=20)
        same(plain, decode(group, max_tokens=20, drafter=drafter_of(name, plain, parts), runner=runner))
    assert [(s.cache.lengths[0], s.position) for s in sessions] == before and len(runner.reads) == 2
    shapes = {shape for read in runner.reads.values() for shape in read.runs}
    assert shapes & ({(16, True)} if name == "random tree" else {(4, False), (8, False)})  # several lengths of draft share a shape


@pytest.mark.parametrize("trees", [False, True])
def test_what_a_fixed_shape_reads_equals_a_forward(trees: bool, parts: Parts) -> None:
    """Logits and caches, hidden states for drafters among them, of rows of unlike lengths; padding is not seen afterwards."""
    sessions = text_sessions(parts, 3, seed=5, taps=(0, 2))
    room, generator = 40, torch.Generator().manual_seed(1)
    with torch.inference_mode():
        read = GraphRunner(parts.model).reader([s.cache for s in sessions], room)
        cache = KVCache.stack([s.cache for s in sessions], room, taps=(0, 2))
        position = torch.tensor([s.position for s in sessions])
        for n, kept in ((3, [2, 3, 1]), (6, [6, 1, 4]), (1, [1, 1, 1]), (2, [0, 2, 1])):
            tokens = torch.randint(1, 500, (3, n), generator=generator)
            tokens[0, -1] = -1
            begun = list(cache.lengths)
            tree = Tree(torch.stack([torch.randint(0, max(1, i), (3,), generator=generator) for i in range(n)], dim=1)) if trees else None
            one, other = read(tokens, position, tree and tree.parents), verify_forward(parts.model, cache, tokens, tree, position)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            for one in (cache, read.cache):
                one.truncate([start + k for start, k in zip(begun, kept, strict=True)])
            position = position + torch.tensor(kept)
        assert read.cache.lengths == cache.lengths and set(read.runs) == {(1, trees), (4, trees), (8, trees)}
        for mine, theirs in zip(read.cache._stores(), cache._stores(), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                for row, length in enumerate(cache.lengths):
                    torch.testing.assert_close(a[row, :, :length], b[row, :, :length], rtol=1e-4, atol=1e-4)
