"""Fixed-shape steps against the eager ones: on the CPU the steps themselves, on a GPU the recorded graphs too."""

from __future__ import annotations

import gc
import threading
import weakref
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperbagel.core.errors import Notice
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.transforms import ImageTransform
from hyperbagel.generate.decode import decode
from hyperbagel.generate.graphs import GRANULE, Captured, GraphRunner, GraphVelocity, StaticStep, no_collection
from hyperbagel.generate.image import GuidedVelocity, denoise
from hyperbagel.generate.session import Parts, Session
from hyperbagel.generate.types import Denoising
from hyperbagel.model.config import BagelConfig, BagelOptions, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.model.init import fresh_bagel
from hyperbagel.model.vae import AutoEncoder
from hyperbagel.nn.kv_cache import KVCache
from hyperbagel.speculative.decode import verify_forward
from hyperbagel.speculative.tree import Tree

TEXTS = ("a red ball", "what is there, and how many of them are blue?", "one")


def parts(device: str = "cpu") -> Parts:
    """Random weights, wide enough apart that greedy tokens vary and velocities are not zero."""
    config = BagelConfig(
        llm=LLMConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1024,
            max_position_embeddings=2048,
        ),
        vit=ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8),
        vae=VaeConfig(ch=8, ch_mult=(1, 1), num_res_blocks=1, downsample=2, norm_groups=4),
        options=BagelOptions(max_latent_size=16, vit_max_num_patch_per_side=16),
    )
    generator = torch.Generator().manual_seed(0)
    model = fresh_bagel(config, generator, std=0.3)
    with torch.no_grad():
        model.llm2vae.weight.copy_(torch.randn(model.llm2vae.weight.shape, generator=generator) * 0.1)
    tokenizer = Tokenizer.from_folder(Path(str(files("hyperbagel") / "assets" / "toybox")))
    sizes = ImageTransform(64, 32, 8)
    return Parts(model.eval().to(device), AutoEncoder(config.vae).eval().to(device), tokenizer, sizes, sizes)


@torch.inference_mode()
def session(of: Parts, text: str) -> Session:
    fresh = Session.new(of)
    fresh.add_text(text)
    return fresh


def same_tokens(device: str, compiler: str | None = None) -> None:
    """Batches of rows of unlike lengths, one runner for all: the second round finds its buffers used."""
    of = parts(device)
    runner = GraphRunner(of.model, compiler=compiler)
    for texts in (TEXTS, TEXTS[:1], TEXTS[::-1], TEXTS[1:2]):
        sessions = [session(of, text) for text in texts]
        before = [s.cache.lengths for s in sessions]
        eager = decode(sessions, max_tokens=12, keep_logits=True)
        static = decode(sessions, max_tokens=12, keep_logits=True, runner=runner)
        assert [d.ids for d in static] == [d.ids for d in eager]
        assert any(len(set(d.ids)) > 3 for d in eager)  # no constant answers
        for a, b in zip(static, eager, strict=True):
            torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), atol=1e-4, rtol=1e-4)
        assert [s.cache.lengths for s in sessions] == before


def same_velocities(device: str, compiler: str | None = None) -> None:
    """Two pictures of unlike sizes; times inside and outside the guidance interval, by turns."""
    of = parts(device)
    settings = Denoising(num_steps=6, interval=(0.5, 1.0))
    sessions, grids = [session(of, text) for text in TEXTS[:2]], [(4, 4), (3, 5)]
    noises = [torch.randn(h * w, of.model.config.latent_channels, generator=torch.Generator().manual_seed(h)) for h, w in grids]
    with torch.inference_mode():
        eager, static = GuidedVelocity(sessions, grids, settings), GuidedVelocity(sessions, grids, settings)
        graph = GraphVelocity(static, compiler)
        for k, t in enumerate((1.0, 0.4, 0.9, 0.3, 0.8, 0.2)):
            x = torch.randn(2, 16, of.model.config.latent_channels, generator=torch.Generator().manual_seed(k)).to(device)
            v = eager(x, t)
            assert v.abs().max() > 0.1
            torch.testing.assert_close(graph(x, t), v, atol=1e-5, rtol=1e-5)
        assert static.evaluations == eager.evaluations == 9
    (a, n), (b, m) = (denoise(sessions, grids, noises, settings, graphs=on) for on in (True, False))
    assert n == m
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_static_decoding_gives_the_eager_tokens() -> None:
    same_tokens("cpu")


def test_static_velocity_equals_the_eager_one() -> None:
    same_velocities("cpu")


@pytest.mark.slow
def test_what_torch_compile_traces_is_the_same() -> None:
    """The backend "eager" runs what was traced; the rest of compilation is the compiler's own."""
    same_tokens("cpu", "eager")
    same_velocities("cpu", "eager")


@pytest.mark.usefixtures("gpu")
def test_recorded_decoding_gives_the_eager_tokens() -> None:
    same_tokens("cuda")


@torch.inference_mode()
def same_reads(device: str, trees: bool) -> None:
    """Drafts of several lengths behind rows of unlike lengths, read twice each and more, so that a graph is replayed."""
    of = parts(device)
    sessions = [session(of, text) for text in TEXTS]
    read = GraphRunner(of.model).reader([s.cache for s in sessions], 40)
    cache, position = KVCache.stack([s.cache for s in sessions], 40), torch.tensor([s.position for s in sessions], device=device)
    for k, n in enumerate((3, 2, 4, 3, 1, 1, 1)):
        tokens = torch.randint(1, 500, (3, n), generator=torch.Generator().manual_seed(k)).to(device)
        tree = Tree.of([[0, *range(n - 1)], [0] * n, [0] * n], device) if trees else None
        eager = verify_forward(of.model, cache, tokens, tree, position)
        torch.testing.assert_close(read(tokens, position, tree and tree.parents), eager, atol=1e-4, rtol=1e-4)
        position = position + n


@pytest.mark.parametrize("trees", [False, True])
def test_static_reads_equal_the_eager_ones(trees: bool) -> None:
    same_reads("cpu", trees)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("trees", [False, True])
def test_recorded_reads_equal_the_eager_ones(trees: bool) -> None:
    same_reads("cuda", trees)


@pytest.mark.usefixtures("gpu")
def test_recorded_velocity_equals_the_eager_one() -> None:
    same_velocities("cuda")


@pytest.mark.usefixtures("gpu")
def test_a_third_call_is_a_replay() -> None:
    x, calls = torch.zeros(1, device="cuda"), []

    def count() -> Tensor:
        calls.append(1)
        x.add_(1)
        return x * 2

    captured = Captured(count, x.device)
    outs = [captured() for _ in range(5)]
    assert [float(out) for out in outs] == [2, 4, 6, 8, 10] and len(calls) == 2


def test_nothing_is_collected_while_a_graph_is_recorded() -> None:
    """What lies in a cycle goes before the block, or after it."""

    class Loop:
        def __init__(self) -> None:
            self.me = self

    before = weakref.ref(Loop())
    assert gc.isenabled()
    with no_collection():
        assert before() is None
        within = weakref.ref(Loop())
        [[] for _ in range(100_000)]  # many times what starts a collection
        assert within() is not None and not gc.isenabled()
    assert gc.isenabled()


@torch.inference_mode()
def test_what_a_request_leaves_behind_is_wiped() -> None:
    """Fixed shapes mask the last request's slots, and 0 times nan is nan: one broken answer must not break all that follow."""
    of = parts()
    runner = GraphRunner(of.model)
    long, short = session(of, TEXTS[1]), session(of, TEXTS[2])
    expected = [answer.ids for answer in decode([short], max_tokens=8, runner=runner)]
    broken = session(of, TEXTS[1])
    for store in (*broken.cache.k, *broken.cache.v):
        store[:, :, broken.cache.lengths[0] - 2 :] = float("nan")
    decode([broken], max_tokens=8, runner=runner)
    assert [answer.ids for answer in decode([short], max_tokens=8, runner=runner)] == expected
    token = torch.tensor([[5], [7]])
    assert of.model.logits(torch.zeros(1, 1, 64)).isfinite().all()
    with torch.inference_mode():
        read = runner.reader([broken.cache, long.cache], 8)
        read(token, torch.tensor([broken.position, long.position]))
        read = runner.reader([short.cache, short.cache], 8)
        assert read(token, torch.tensor([short.position] * 2)).isfinite().all()
    runner.forget()
    assert not runner.steps and not runner.reads and runner.step is None


def test_a_step_that_cannot_be_recorded_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for what needs a GPU: the second call records, fails, warns once, and all calls compute."""
    streams: list[object] = []

    class Refuses:
        def __init__(self, *given: object, **more: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise self.error

        error: Exception = RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Refuses)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "usual")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    calls = iter(range(10))
    step = Captured(lambda: torch.tensor(next(calls)), torch.device("cpu"))
    step.stream, step.out = "its own", step.function()  # type: ignore[assignment]
    with pytest.warns(Notice, match="operation not permitted when stream is capturing"):
        assert step() == 2  # 1 was computed in vain
    assert streams == ["usual"] and step() == 3 and step() == 4
    monkeypatch.setattr(Refuses, "error", torch.OutOfMemoryError("CUDA out of memory"))
    step.stream = "its own"  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        step()


def test_mask_of_a_static_step() -> None:
    """The matrix of StaticStep's docstring, read from what the backbone is given."""
    of = parts()
    step, seen = StaticStep(of.model, rows=2, capacity=6), []
    caches = [of.model.new_cache() for _ in range(2)]
    for cache, length in zip(caches, (2, 4)):
        cache.reserve(length)
        cache.advance([length])
    step.load(caches, [2, 4])
    backbone = of.model.backbone
    of.model.backbone = lambda *a, **how: (seen.append(how["plan"].mask.clone()), backbone(*a, **how))[1]  # type: ignore[method-assign]
    step(torch.ones(2, 1, dtype=torch.long))
    assert seen[0][:, 0, 0].int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]


def test_recordings_of_two_threads_take_turns() -> None:
    inside, entered, done = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        with no_collection():
            entered.set()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with no_collection():
        inside.set()
        assert not entered.wait(0.2) and not gc.isenabled()
    assert done.wait(10) and gc.isenabled()
    thread.join()


@torch.inference_mode()
def test_runner_keeps_few_steps_and_reuses_them() -> None:
    of = parts()
    runner = GraphRunner(of.model, keep=2)
    caches = [session(of, text).cache for text in TEXTS]

    def begin(rows: int, room: int) -> StaticStep:
        runner.begin(caches[:rows], [cache.lengths[0] for cache in caches[:rows]], room)
        assert runner.step is not None
        return runner.step

    first = begin(1, 10)
    assert begin(1, 20) is first  # the same capacity
    second = begin(2, GRANULE)
    assert second.capacity == 2 * GRANULE and begin(1, 5) is first
    assert begin(3, 5) is not first and len(runner.steps) == 2
    cache = weakref.ref(second.cache)
    del second
    gc.disable()
    try:
        begin(2, GRANULE)  # another one: that was the longest unused, and its memory is free before the new one's is taken
        assert cache() is None
    finally:
        gc.enable()
    end = begin(1, GRANULE - caches[0].lengths[0])
    assert end.left == end.capacity - caches[0].lengths[0]
    end.left = 0
    with pytest.raises(AssertionError, match="more than"):
        end(torch.ones(1, 1, dtype=torch.long))
