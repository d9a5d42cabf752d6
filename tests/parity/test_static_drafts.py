"""Drafters' rounds in fixed shapes against the eager ones: on the CPU the rounds themselves, on a GPU the recorded graphs too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity_world import CONFIG, Stub, large_weights, make_parts, mixed_sessions, text_sessions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperbagel.generate.decode import Decoded
from hyperbagel.generate.decode import decode as plain_decode
from hyperbagel.generate.graphs import SIZES, GraphRunner, StaticRead
from hyperbagel.generate.session import Parts, Session
from hyperbagel.model.bagel import Bagel
from hyperbagel.speculative.decode import decode
from hyperbagel.speculative.drafters.choice import choose_by
from hyperbagel.speculative.drafters.config import DrafterConfig, Kind
from hyperbagel.speculative.drafters.folder import make_drafter, make_module
from hyperbagel.speculative.drafters.serve_blocks import BlockProposer
from hyperbagel.speculative.drafters.serve_chains import AutoregressiveDrafter
from hyperbagel.speculative.drafters.static import StaticDraft
from hyperbagel.speculative.tree import Tree
from hyperbagel.speculative.types import Draft, Seen

DEPTH, NODES = 6, 12
WRONG = 1  # a token that is hardly ever the target's
KINDS: tuple[Kind, ...] = ("eagle3", "hyper-bagel", "block")
Served = AutoregressiveDrafter | BlockProposer


def module_of(kind: Kind) -> torch.nn.Module:
    own = {"block": DEPTH, "rank": 8} if kind == "block" else {"zero_init": False} if kind == "hyper-bagel" else {"draft_vocab": 700}
    return large_weights(make_module(DrafterConfig.for_target(kind, CONFIG.llm, **own)), 0.2)


def drafter_of(kind: Kind, parts: Parts, nodes: int = 0) -> Served:
    module = module_of(kind).to(parts.model.device)
    # as many nodes of a level may be expanded as there are, so that both searches for trees find the same
    made = make_drafter(module, parts.model, depth=DEPTH, nodes=nodes, branch=NODES)  # type: ignore[arg-type]
    assert isinstance(made, AutoregressiveDrafter | BlockProposer)
    return made


class Both(Stub):
    """Asks `fixed`, and a twin that never hears of fixed shapes, compares them, and drafts the target's own tokens up to a random one. So
    rounds have every number of new slots. Now and then nobody is asked, and more is new the next time."""

    width, depth = DEPTH, DEPTH

    def __init__(self, fixed: Served, twin: Served, plain: Sequence[Decoded], parts: Parts) -> None:
        super().__init__(plain, parts.tokenizer.im_end, CONFIG.llm.vocab_size)
        self.fixed, self.twin, self.taps, self.compared = fixed, twin, fixed.taps, 0

    def begin(self, sessions: Sequence[Session], temperature: float, generators: Sequence[torch.Generator]) -> None:
        super().begin(sessions, temperature, generators)
        self.news: Seen | None = None
        for one in (self.fixed, self.twin):
            one.begin(sessions, temperature, [torch.Generator().manual_seed(row) for row in range(len(sessions))])

    def propose(self, seen: Seen, limit: int) -> Draft:
        self.news = seen.after(self.news)
        if self.rng.random() < 0.8:
            self.compare(self.news, limit)
            self.news = None
        n = self.rng.randint(0, min(limit, DEPTH))
        right = [ids[: self.rng.randint(0, n)] for ids in self.ahead(seen, limit)]
        rows = [[*ids, *[WRONG] * n][:n] for ids in right]
        return Draft(torch.tensor(rows, dtype=torch.long, device=seen.root.device).view(len(rows), n))

    def compare(self, news: Seen, limit: int) -> None:
        alive = [row for row, n in enumerate(news.counts) if n]
        fixed, eager = self.fixed.propose(news, limit), self.twin.propose(replace(news, read=None), limit)
        assert self.fixed.cache.lengths == self.twin.cache.lengths
        self.compared += len(alive)
        if self.fixed.nodes:
            return self.compare_trees(fixed, eager, alive, limit)
        drafted = eager.tokens.shape[1]  # on a CPU the eager one stops where all rows have ended
        assert 0 < drafted <= fixed.tokens.shape[1] <= min(limit, DEPTH)
        if eager.q is None:
            assert fixed.q is None and fixed.tokens[alive, :drafted].tolist() == eager.tokens[alive].tolist()
        else:  # other draws; but the first token of each draft is drawn from the same probabilities
            assert fixed.q is not None and fixed.q.shape[:2] == fixed.tokens.shape
            torch.testing.assert_close(fixed.q[alive, 0], eager.q[alive, 0], atol=1e-5, rtol=1e-3)

    def compare_trees(self, fixed: Draft, eager: Draft, alive: list[int], limit: int) -> None:
        assert fixed.q is None and fixed.tree is not None and fixed.tokens.shape[1] == NODES
        for row in alive:
            told, found = paths_of(eager, row), paths_of(fixed, row)
            assert told and told <= found and max(map(len, found)) <= limit
            assert len(found) == len(told) or len(told) < NODES  # by the other search too unlikely ones are none

    def end(self, counts: Sequence[int]) -> None:
        self.fixed.end(counts)
        self.twin.end(counts)


def paths_of(draft: Draft, row: int) -> set[tuple[int, ...]]:
    """The tokens from the root down to each node of one row."""
    n = draft.tokens.shape[1]
    tokens, parents = draft.tokens[row].tolist(), (draft.tree or Tree.chain(len(draft.tokens), n)).parents[row].tolist()
    known: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents[1:], strict=True):
        known.append((*known[parent], token))
    return {path for path in known[1:] if -1 not in path}


def same_drafts(kind: Kind, temperature: float, parts: Parts, nodes: int = 0, length: int = 40) -> None:
    """Batches of rows of unlike lengths, lone rows, one runner for all: later requests find buffers and graphs used."""
    fixed, twin = drafter_of(kind, parts, nodes), drafter_of(kind, parts, nodes)
    sessions = list({s.cache.lengths[0]: s for s in text_sessions(parts, 12, taps=fixed.taps)}.values())[:3]
    assert len(sessions) == 3
    runner = GraphRunner(parts.model)
    for group in (sessions, sessions[:1], sessions[::-1], sessions[1:2]):
        answers = plain_decode(group, max_tokens=length)
        both = Both(fixed, twin, answers, parts)
        generators = [torch.Generator().manual_seed(row) for row in range(len(group))]
        out = decode(group, max_tokens=length, temperature=temperature, generators=generators, drafter=both, runner=runner)
        assert both.compared >= 4 and (temperature > 0 or [o.ids for o in out] == [a.ids for a in answers])
    assert len(runner.reads) == 2  # three rows, and one
    for read in runner.reads.values():
        draft = read.drafts[fixed]
        assert isinstance(draft, StaticDraft) and len({n for n, _, _ in draft.runs}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_in_fixed_shapes_are_the_eager_ones(kind: Kind, temperature: float, parts: Parts) -> None:
    same_drafts(kind, temperature, parts)


def test_a_temperature_near_none_draws_the_likeliest_in_fixed_shapes_too(parts: Parts) -> None:
    """fp32 holds no such number: divided by it, logits would be no numbers."""
    same_drafts(KINDS[0], 1e-50, parts)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_trees_in_fixed_shapes_are_the_eager_ones(temperature: float, parts: Parts) -> None:
    """The search by tensors, in rounds of a fixed shape, against the search one by one."""
    same_drafts("block", temperature, parts, NODES)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("kind", "nodes"), [*((kind, 0) for kind in KINDS), ("block", NODES)])
def test_recorded_drafts_are_the_eager_ones(kind: Kind, nodes: int) -> None:
    """On a GPU both searches for trees are by tensors, one recorded."""
    same_drafts(kind, 0.0, make_parts(device="cuda"), nodes, length=20)


@torch.inference_mode()
def first_draft(drafter: Served, session: Session, read: StaticRead) -> Seen:
    """A request's first draft, eager since a context is read, and the news of a round that accepted nothing."""
    drafter.begin([session], 0.0, ())
    root, position = torch.tensor([session.parts.tokenizer.im_start]), torch.tensor([session.position])
    n = session.cache.lengths[0]
    drafter.propose(Seen(read.cache, [0], [n], [[]], root, position, read), DEPTH)
    read(root[:, None], position)
    return Seen(read.cache, [n], [1], [[int(root)]], root + 6, position + 1, read)


@torch.inference_mode()
def at_work(kind: Kind, parts: Parts, nodes: int = 0) -> tuple[Served, Session, StaticRead]:
    """A drafter, a context, and who verifies after it in fixed shapes."""
    drafter = drafter_of(kind, parts, nodes)
    [session] = text_sessions(parts, 1, seed=2, taps=drafter.taps)
    return drafter, session, GraphRunner(parts.model).reader([session.cache], 40)


@torch.inference_mode()
def test_a_row_ends_where_it_is_unsure(parts: Parts) -> None:
    """What one is sure of may change between rounds, and the shapes stay: -1 from the first token whose chance is too small."""
    drafter, session, read = at_work("block", parts)
    news = first_draft(drafter, session, read)
    found, committed = {}, list(drafter.cache.lengths)
    for least in (0.0, 0.8, 1.1, 0.0):
        drafter.threshold = least
        drafter.cache.truncate(committed)
        found[least] = drafter.propose(news, DEPTH).tokens[0].tolist()
    sure = found[0.8].index(-1)
    assert 0 < sure < DEPTH and found[0.8] == [*found[0.0][:sure], *[-1] * (DEPTH - sure)]
    assert found[1.1] == [-1] * DEPTH and -1 not in found[0.0]
    drafter.threshold = 0.8
    drafter.cache.truncate(committed)
    assert drafter.propose(replace(news, read=None), DEPTH).tokens[0].tolist() == found[0.0][:sure]


def test_answers_from_trees_in_fixed_shapes(parts: Parts) -> None:
    """From the first draft on, which is eager since a context is longer than what has fixed shapes: token for token plain decoding's."""
    drafter, runner = drafter_of("block", parts, NODES), GraphRunner(parts.model)
    sessions = mixed_sessions(parts, drafter.taps)
    assert max(s.cache.lengths[0] for s in sessions) > SIZES[-1]
    for group in (sessions, sessions[:1], sessions[::-1]):
        plain = plain_decode(group, max_tokens=20)
        out = decode(group, max_tokens=20, drafter=drafter, runner=runner)
        assert [o.ids for o in out] == [o.ids for o in plain]
    assert all({(16, True)} <= set(read.runs) <= {(1, False), (16, True)} for read in runner.reads.values())


@torch.inference_mode()
def test_a_tree_in_a_fixed_shape_holds_what_fits(parts: Parts) -> None:
    """Reading fewer of its nodes would not be faster, so it keeps those that are left out elsewhere as too unlikely."""
    drafter, session, read = at_work("block", parts, NODES)
    news = first_draft(drafter, session, read)
    committed, found = list(drafter.cache.lengths), []
    for least in (0.0, 0.05):
        drafter.threshold = least
        for reads in (read, None):
            drafter.cache.truncate(committed)
            found.append(paths_of(drafter.propose(replace(news, read=reads), DEPTH), 0))
    assert found[0] == found[2] >= found[1] > found[3] > set()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_one_request_leaves_nothing_in_the_next(kind: Kind, parts: Parts) -> None:
    """Slots behind a row's end are only masked, so what the last request left there is wiped."""
    drafter, session, read = at_work(kind, parts)
    drafts = []
    for _ in range(2):
        news = first_draft(drafter, session, read)
        drafts.append(drafter.propose(news, DEPTH).tokens.tolist())
        for store in (*drafter.cache.k, *drafter.cache.v):
            store.fill_(float("nan"))
        drafter.end([0])
        assert not hasattr(drafter, "cache")
        read.cache.truncate(session.cache.lengths)
    assert drafts[0] == drafts[1] and len(read.drafts) == 1


@torch.inference_mode()
def test_a_cache_that_grew_is_recorded_anew(parts: Parts) -> None:
    """Recorded rounds hold addresses: where many new slots at once had the drafter's cache grow, they go."""
    drafter, session, read = at_work("block", parts)
    news = first_draft(drafter, session, read)
    committed = list(drafter.cache.lengths)
    before = drafter.propose(news, DEPTH).tokens.tolist()
    static = read.drafts[drafter]
    assert isinstance(static, StaticDraft)
    recorded = list(static.runs.values())
    drafter.cache.truncate(committed)
    drafter.cache.grow(drafter.cache.capacity + 1)
    assert drafter.propose(news, DEPTH).tokens.tolist() == before
    assert not set(recorded) & set(static.runs.values()) and static.capacity == drafter.cache.capacity
    read.release()
    assert not static.runs and not read.drafts


@pytest.mark.parametrize(("kind", "nodes"), [*((kind, 0) for kind in KINDS), ("block", NODES)])
@torch.inference_mode()
def test_all_that_changes_between_rounds_is_in_buffers(kind: Kind, nodes: int, parts: Parts) -> None:
    """A recorded round never looks at its drafter again: budgets, temperatures and the token that ends an answer are read from buffers."""
    drafter, session, read = at_work(kind, parts, nodes)
    news = first_draft(drafter, session, read)
    committed = list(drafter.cache.lengths)
    free = drafter.propose(news, 4)
    drafter.im_end = int(free.tokens[0, 0])  # nothing follows the likeliest first token
    drafter.cache.truncate(committed)
    ended = drafter.propose(news, 4)
    if nodes:
        assert [any(len(path) > 1 and path[0] == drafter.im_end for path in paths_of(draft, 0)) for draft in (free, ended)] == [True, False]
    static = read.drafts[drafter]
    assert isinstance(static, StaticDraft)
    last = list(static.runs.values())[-1]
    before = last.function()
    drafter.im_end, drafter.threshold, drafter.temperature = -1, 0.9, 5.0
    assert torch.equal(last.function(), before)


@pytest.mark.parametrize(("kind", "nodes"), [*((kind, 0) for kind in KINDS), ("block", NODES)])
@torch.no_grad()
def test_a_round_neither_looks_at_a_number_nor_leaves_the_device(kind: Kind, nodes: int) -> None:
    """Either would break a recording. Tensors without numbers refuse the first; the second shows in the devices of an operation."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            devices.append({x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)})
            return out

    devices: list[set[str]] = []
    with torch.device("meta"):
        model = Bagel(CONFIG).to(torch.bfloat16)
    module = make_module(module_of(kind).config).to("meta", torch.bfloat16)  # type: ignore[arg-type]
    drafter = make_drafter(module, model, depth=DEPTH, nodes=nodes)
    drafter.im_end, drafter.temperature = 7, 0.0
    read = StaticRead(model, 3, 512, drafter.taps)
    static = drafter._static(read)
    with Watch():
        for sampled in (False, True) if not nodes else (False,):
            drafter.temperature = float(sampled)
            assert static._round(4, DEPTH, sampled).dtype == torch.long
        tokens = torch.zeros(3, 16, dtype=torch.long, device="meta")
        assert read.forward(tokens, tokens if nodes else None).shape == (3, 16, CONFIG.llm.vocab_size)
    assert {"meta"} in devices and all(len(own) <= 1 for own in devices)


def test_tokens_drawn_on_the_device_are_distributed_as_they_say() -> None:
    """Chi-square of 20,000 draws by inversion; a row that is not finite is drawn evenly."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, q = choose_by(logits.expand(20_000, -1), torch.tensor(0.7), uniforms)
    assert q is not None
    torch.testing.assert_close(q[0], (logits / 0.7).softmax(-1))
    expected, seen = q[0].double() * 20_000, torch.bincount(tokens, minlength=50).double()
    likely = expected > 5
    freedom = int(likely.sum()) - 1
    assert freedom > 20 and ((seen - expected) ** 2 / expected)[likely].sum() < freedom + 4.5 * (2 * freedom) ** 0.5
    rough = logits.bfloat16()
    torch.testing.assert_close(choose_by(rough[None], torch.tensor(0.7), uniforms[:1])[1], (rough.float() / 0.7).softmax(-1)[None])
    logits[3] = float("nan")
    assert torch.equal(choose_by(logits[None], torch.tensor(1.0), uniforms[:1])[1], torch.full((1, 50), 1 / 50))


@torch.inference_mode()
def test_what_is_released_holds_no_buffer(parts: Parts) -> None:
    """Nor what sampled tokens were drawn from."""
    drafter, session, read = at_work("block", parts)
    news = first_draft(drafter, session, read)
    drafter.temperature, drafter.generators = 1.0, [torch.Generator().manual_seed(0)]
    drafter.propose(news, DEPTH)
    static = read.drafts[drafter]
    assert isinstance(static, StaticDraft) and static.runs and static.q
    read.release()
    assert not static.runs and not static.q
