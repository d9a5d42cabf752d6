"""The benchmarks run, say what they did, and count work as the model does it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import conversation, soak, subjects
from benchmarks import folder as folder_benchmark
from benchmarks import load as load_benchmark
from benchmarks import run as benchmark
from benchmarks import server as server_benchmark
from benchmarks.attention import folded
from benchmarks.operations import Workload, operations
from benchmarks.server import other_picture
from benchmarks.subjects import load, shapes_only
from benchmarks.table import show
from hyperbagel.model.config import BagelConfig, BagelOptions, ImageSizes, LLMConfig, VaeConfig, ViTConfig
from hyperbagel.nn.attention import reference
from hyperbagel.nn.quantized import Codes
from hyperbagel.pipeline import HyperBagel

SMALL = BagelConfig(
    llm=LLMConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2),
    vit=ViTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=128, patch_size=8),
    vae=VaeConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4),
    options=BagelOptions(
        max_latent_size=16,
        vit_max_num_patch_per_side=16,
        default_size=(128, 128),
        vae_transform=ImageSizes(max_size=128, min_size=64, stride=16),
        vit_transform=ImageSizes(max_size=128, min_size=64, stride=8),
    ),
)


def found(*given: str) -> dict[str, Any]:
    return benchmark.run(benchmark.arguments(["--device", "cpu", "--smallest", "--each", "0.01", *given]))


def test_every_operation_is_timed(tmp_path: Path) -> None:
    out = found()
    assert out["failed"] == [] and out["left_out"] == []
    names = [figure["name"] for figure in out["figures"]]
    assert len(set(names)) == len(names) and {name.split()[0] for name in names} == {"step", "decode", "prefill", "vae", "attention"}
    for figure in out["figures"]:
        ms = figure["milliseconds"]
        assert 0 < ms["fastest"] <= ms["low"] <= ms["median"] <= ms["high"] and figure["runs"] >= 3
        assert figure["flops"] > 0 and figure["bytes"] > 0 and figure["fraction"] > 0
    table = show(out)
    assert all(name in table for name in names)
    assert json.loads(json.dumps(out))["hardware"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("codes", ["int8", "nf4"])
def test_a_model_in_codes(codes: str) -> None:
    """Decoding reads fewer bytes; the work of a product is the same."""
    coded, plain = (found("--only", "decode eager", "--dtype", dtype) for dtype in (codes, "float32"))
    assert coded["failed"] == [] and coded["shape"]["dtype"] == codes
    for mine, theirs in zip(coded["figures"], plain["figures"], strict=True):
        assert mine["name"] == theirs["name"] and mine["flops"] == theirs["flops"]
        assert mine["bytes"] < 0.6 * theirs["bytes"]
    big = found("--only", "decode eager", "--dtype", codes, "--shape", "7b")
    assert big["shape"]["dtype"] == codes and big["figures"][0]["bytes"] < 9e9  # in bf16 14 GB


def test_the_server_beside_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert server_benchmark.main(["--runs", "2", "--steps", "1", "--out", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())["milliseconds"]
    assert set(found) == {"picture", "edit", "answer", "first streamed text"} and found["picture"]["server"]["runs"] == 2
    assert all(found[name][arm]["median"] > 0 for name in ("picture", "edit", "answer") for arm in ("server", "library"))
    assert found["first streamed text"]["median"] > 0 and "overhead" in capsys.readouterr().out


@pytest.mark.slow
def test_many_questions_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two servers of this version: their answers are the same."""
    here = Path(__file__).parents[2]
    given = ["--clients", "3", "--seconds", "1.5", "--blocks", "1", "--against", str(here), "--out", str(tmp_path / "a.json")]
    assert load_benchmark.main(given) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["arms"]) == {load_benchmark.HERE, load_benchmark.THERE} and str(here) not in (tmp_path / "a.json").read_text()
    assert all(arm["tokens_per_second"] > 0 and arm["short"]["answers"] > 0 for arm in found["arms"].values())
    assert "0 things were wrong" in capsys.readouterr().out


def test_a_conversation_is_read_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "conversation.json"
    assert conversation.main(["--conversations", "1", "--questions", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {arm: len(of) for arm, of in found["milliseconds"].items()} == {"read on": 2, "read anew": 2}
    assert all(cell["median"] > 0 for of in found["milliseconds"].values() for cell in of)
    first, second = found["tokens"]
    assert 0 < first < second and "question 2" in capsys.readouterr().out


def test_another_picture_has_another_pixel() -> None:
    source = Image.new("RGB", (3, 2), "red")
    others = {other_picture(source, i).tobytes() for i in range(6)}
    assert len(others) == 6 and source.tobytes() not in others and source.getcolors() == [(6, (255, 0, 0))]


def test_a_checkout_serves_its_own_version(tmp_path: Path) -> None:
    package = tmp_path / "hyperbagel"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text("import sys\nsys.exit('the version of ' + __file__)\n")
    with pytest.raises(SystemExit, match=f"the version of {package}"), server_benchmark.serving("toybox", tmp_path):
        pass


def test_answers_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """From block to block, and within one; so is a refusal."""
    told = iter(["yes", "no", "yes", "maybe"])

    class Http:
        def __init__(self, **how: Any) -> None: ...

        def __enter__(self) -> Http:
            return self

        def __exit__(self, *error: object) -> None: ...

        def post(self, path: str, json: Any) -> Any:
            text = next(told, None)
            body = {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 2}}
            return SimpleNamespace(status_code=429 if text is None else 200, json=lambda: body)

    monkeypatch.setattr(load_benchmark.httpx2, "Client", Http)
    block = load_benchmark.Block("", [(False, {}), (True, {})], clients=1, seconds=5, pause=0)
    assert [line.split(":")[0] for line in block.failed] == ["question 1", "question 0"] and "429" in block.failed[1]
    assert block.answers == {0: "yes", 1: "no"} and block.tokens == 8
    assert load_benchmark.summary([block])["short"]["answers"] == 2


@pytest.mark.slow
def test_a_short_soak_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--minutes", "0.1", "--clients", "2", "--out", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["done"]) >= {"draw", "edit", "ask", "left", "refused", "live"} and found["idle_after"]["left"] == 0
    assert "0 things were wrong" in capsys.readouterr().out and found["tenths"][-1]["mb"] > 100


def test_what_a_soak_calls_wrong() -> None:
    seen = soak.Seen()
    grey, light, white = (picture(level) for level in (100, 102, 255))
    for key, result in (("a", grey), ("a", light), ("b", white), ("c", "yes"), ("c", "yes")):
        seen.add("draw", key, result)
    assert not seen.wrong and seen.apart == 2 and seen.done["draw"] == 5
    for key, result in (("a", white), ("a", picture(100, 32)), ("a", "yes"), ("c", "no")):
        seen.add("draw", key, result)
    assert [line.split(":")[0] for line in seen.wrong] == ["draw a"] * 3 + ["draw c"]
    quiet = {"mb": 1.0, "threads": 4, "files": 8, "left": 0}
    for change, wrong in (({}, False), ({"threads": 8}, False), ({"threads": 9}, True), ({"files": 9}, True), ({"left": 1}, True)):
        told = {"n_wrong": 0, "idle_before": quiet, "idle_after": quiet | change, "clients": 2}
        assert soak.failed(told) is wrong and soak.failed(told | {"n_wrong": 1})


def test_the_tenths_of_a_soak() -> None:
    looks = [{"seconds": 6.0 * i, "mb": float(i), "threads": i % 3, "files": 7} for i in range(1, 21)]
    found = soak.tenths(looks)
    assert [at["minutes"] for at in found] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert found[0] == {"minutes": pytest.approx(0.2), "threads": 2, "mb": 1.5, "files": 7} and len(soak.tenths(looks[:3])) == 3


def picture(level: int, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), level).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_does_not_fit_the_budget_is_named() -> None:
    out = found("--budget", "0", "--only", "vae")
    assert out["figures"] == [] and out["left_out"] == ["vae encode", "vae decode"]
    assert "left out, no time: vae decode" in show(out)


def test_wrong_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    assert benchmark.main(["--shape", str(tmp_path / "none"), "--device", "cpu", "--threads", threads]) == 2
    assert benchmark.main(["--threads", "0", "--device", "cpu"]) == 2
    small = ["--device", "cpu", "--threads", threads]
    assert benchmark.main([*small, "--each", "nan"]) == 2 and benchmark.main([*small, "--only", "nosuch", "--each", "0.01"]) == 2
    (tmp_path / "file").write_text("")
    assert benchmark.main([*small, "--out", str(tmp_path / "file" / "x.json")]) == 2
    told = capsys.readouterr().err
    assert told.count("error: got ") == 4 and told.count("error: ") == 5


def test_wrong_input_of_the_server_s_benchmarks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert server_benchmark.main(["--model", str(tmp_path / "none")]) == 2
    assert "error: " in capsys.readouterr().err
    for wrong in ("--runs", "--steps"):
        with pytest.raises(SystemExit):
            server_benchmark.main([wrong, "0"])
    for wrong in ("--minutes", "--clients"):
        with pytest.raises(SystemExit):
            soak.main([wrong, "0"])


def test_closed_forms_equal_what_the_model_computes() -> None:
    """On the meta device, every matrix product counted. The forms leave out time embeddings and masked scores, and add nothing."""
    parts = shapes_only(SMALL)
    for name, ready in operations(parts, Workload.of(parts).smallest(), graphs=False, compiler=None):
        with torch.no_grad():
            figure = benchmark._counted(ready())
        most = 1.001 if name.startswith(("decode", "vae", "attention step, no")) else 1.15
        assert 0.999 <= figure["flops_counted"] / figure["flops"] <= most, name


@pytest.mark.parametrize("codes", [None, "int8"])
def test_random_weights(codes: Codes | None) -> None:
    """The 7B shape's way, at a small one: made tensor by tensor, so that codes never stand beside the whole model."""
    parts = subjects.random_model(SMALL, torch.device("cpu"), torch.float32, codes)
    assert parts.model.precision == (codes or "float32")
    weights = [p for p in parts.model.parameters() if p.is_floating_point() and p.ndim > 1]
    assert all(0.015 < float(p.std()) < 0.025 for p in weights) and weights
    ready = dict(operations(parts, Workload.of(parts).smallest(), graphs=False, compiler=None))
    with torch.inference_mode():
        assert ready["step eager guided x1"]().call().std() > 0


def test_branches_in_turn_and_in_one_batch_are_the_same_velocity() -> None:
    parts = load("toybox", torch.device("cpu")).parts
    ready = dict(operations(parts, Workload.of(parts).smallest(), graphs=False, compiler=None))
    for one, other in (
        ("step eager guided x1", "step eager guided, branches in turn"),
        ("step eager edit", "step eager edit, branches in turn"),
    ):
        with torch.inference_mode():
            v, w = ready[one]().call(), ready[other]().call()
        assert v.std() > 1e-3
        torch.testing.assert_close(v, w, atol=1e-4, rtol=1e-4)


def test_groups_as_queries_is_the_same_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((6, 1), (2, 5), (2, 5)))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None, :]
    torch.testing.assert_close(folded(q, k, v, mask), reference(q, k, v, mask))


def test_a_folder_of_random_weights_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--shape", "toybox", "--out", str(tmp_path / "new" / "model")]
    assert folder_benchmark.main(given) == 0
    model = HyperBagel.from_pretrained(tmp_path / "new" / "model", dtype="bfloat16")
    assert model.ask("What is this?", max_tokens=3).tokens == 3 and model.generate("a red car", seed=0, steps=1, size=(64, 64))
    assert all(torch.isfinite(x).all() and x.std() > 0 for x in model.parts.model.parameters() if x.dim() > 1)
    assert folder_benchmark.main(given) == 2
    assert "got a folder that exists, expected a new one" in capsys.readouterr().err
