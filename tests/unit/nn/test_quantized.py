"""Matrices in 4 and 8 bits: what a layer computes, how near its weights are, what they take; and whole models that hold them."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hyperbagel import cli
from hyperbagel.core.errors import InputError
from hyperbagel.evaluate.toybox import numbers_of
from hyperbagel.generate.session import Parts
from hyperbagel.generate.students import Ready
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.inspection import inspect_folder
from hyperbagel.model.student import Sampler, Student, fingerprint, load_student, make_adapter, save_student
from hyperbagel.model.weights import load_folder
from hyperbagel.nn import quantized
from hyperbagel.nn.lora import AdaptedLinear, LowRank, MergedLinear
from hyperbagel.nn.projections import store_by_columns
from hyperbagel.nn.quantized import CODES, Codes, Int8Linear, QuantizedLinear, bytes_of_a_weight, numbers, quantize
from hyperbagel.pipeline import HyperBagel, model_folder
from hyperbagel.speculative.kept_costs import KeptCosts

CPU = torch.device("cpu")


def layer(codes: Codes, inner: int = 256, outer: int = 320, bias: bool = True) -> tuple[QuantizedLinear, nn.Linear]:
    torch.manual_seed(0)
    given = nn.Linear(inner, outer, bias)
    return quantize(given, given.weight.detach(), codes), given


def plainly(model: Bagel) -> Bagel:
    """The slow reference: every quantised layer replaced by an ordinary one that holds the unpacked matrix."""
    for name, part in list(model.named_modules()):
        if isinstance(part, QuantizedLinear):
            model.set_submodule(name, part.plain())
    model.codes = None
    return model


@pytest.fixture(scope="module", params=CODES)
def quantised(request: pytest.FixtureRequest) -> HyperBagel:
    return HyperBagel.from_pretrained("toybox", device="cpu", dtype=request.param)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (2, 40)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_product_is_that_of_the_unpacked_matrix(codes: Codes, rows: tuple[int, ...], bias: bool) -> None:
    mine, _ = layer(codes, bias=bias)
    x = torch.randn(*rows, 256)
    found, wanted = mine(x), mine.plain()(x)
    if codes == "int8" and wanted[..., 0].numel() <= quantized._FEW:  # input and result in bf16
        assert 0 < (found - wanted).norm() / wanted.norm() < 0.005
    else:
        assert torch.equal(found, wanted)
    assert torch.equal(copy.deepcopy(mine)(x), found)
    assert (mine.bias is None) is not bias


@torch.inference_mode()
def test_few_rows_do_not_depend_on_their_number() -> None:
    """So a drafted answer's logits are a plain one's."""
    mine, _ = layer("int8")
    x = torch.randn(quantized._FEW, 256)
    for n in range(1, len(x) + 1):
        assert torch.equal(mine(x[None, :n]), mine(x)[None, :n])
    assert mine(x[:0]).shape == (0, 320)


@pytest.mark.parametrize("inner", [1, 12, 24, 96, 100])
@pytest.mark.parametrize("weight_by_columns", [True, False])
@torch.inference_mode()
def test_rows_that_are_no_multiple_of_a_vector(inner: int, weight_by_columns: bool) -> None:
    """PyTorch's kernel would read beyond them."""
    given = nn.Linear(inner, 40)
    weight = given.weight.detach()
    mine, x = quantize(given, weight.t().contiguous().t() if weight_by_columns else weight, "int8"), torch.randn(3, inner)
    assert torch.equal(mine(x), mine.plain()(x))


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_autocast_decides_the_result_s_type(rows: int, tiles: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_TILE", 256 * 100 if tiles else 2**20)
    mine, _ = layer("int8", bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert mine(torch.randn(rows, 256)).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_on_a_cpu_take_the_matrix_in_tiles(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_TILE", 256 * 100)  # 320 rows: 100, 100, 100 and 20
    mine, _ = layer("int8", bias=bias)
    x = torch.randn(2, 40, 256)
    torch.testing.assert_close(mine(x), mine.plain()(x), rtol=1e-5, atol=1e-5)


def test_int8_needs_no_library_and_keeps_rows_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized._library.cache_clear()
    assert numbers("int8", CPU) == (torch.float32, "int8")
    given = nn.Linear(64, 3)
    with torch.no_grad():
        given.weight[1] = 0
        given.weight[2] *= 1e-8
    mine = quantize(given, given.weight.detach(), "int8")
    assert torch.equal(mine.unpacked()[1], torch.zeros(64))
    torch.testing.assert_close(mine.unpacked()[[0, 2]], given.weight[[0, 2]], rtol=0.5, atol=1e-3)
    assert (mine.unpacked() - given.weight).norm(dim=1)[2] < 0.02 * given.weight[2].norm()


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("amp", [False, True])
def test_gradients_pass_through_codes(codes: Codes, amp: bool) -> None:
    """Those of the unpacked matrix, which is not kept between the passes."""
    mine, _ = layer(codes)
    kept: list[torch.Tensor] = []
    found = []
    for module in (mine, mine.plain().requires_grad_(False)):
        x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t)  # type: ignore[func-returns-value]
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), hooks:
            y = module(x)
        if module is mine:
            assert not kept
        y.float().square().sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32
        found.append((y.detach(), x.grad))
    assert kept and torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("codes", "bound"), [("int8", 0.01), ("nf4", 0.1)])
@pytest.mark.parametrize("inner", [256, 24])  # 24: blocks end within rows
def test_weights_stay_near(codes: Codes, bound: float, inner: int) -> None:
    torch.manual_seed(1)
    given = nn.Linear(inner, 320, bias=False)
    weight = nn.init.normal_(given.weight.detach())
    away = float((quantize(given, weight, codes).unpacked() - weight).norm() / weight.norm())
    assert bound / 4 < away < bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codes", CODES)
@torch.inference_mode()
def test_products_on_a_gpu(codes: Codes) -> None:
    """Against the unpacked matrix in fp32: as near as bf16 products are, also where few rows are multiplied by the codes themselves."""
    torch.manual_seed(0)
    for inner, outer in ((512, 320), (3584, 512), (3584, 18944), (18944, 3584)):
        given = nn.Linear(inner, outer, device="cuda", dtype=torch.bfloat16)
        mine = quantize(given, given.weight.detach(), codes)
        for rows in (1, 4, 8, 16, 64, 300):
            x = torch.randn(1, rows, inner, device="cuda", dtype=torch.bfloat16)
            wanted = mine.plain().float()(x.float())
            assert float((mine(x).float() - wanted).norm() / wanted.norm()) < 0.02, (inner, outer, rows)


@pytest.mark.parametrize("codes", CODES)
def test_what_a_weight_takes(codes: Codes) -> None:
    mine, given = layer(codes, 1024, 512, bias=False)
    scales = [mine.scale] if isinstance(mine, Int8Linear) else [mine.state.absmax, mine.state.state2.absmax]
    taken = sum(x.numel() * x.element_size() for x in [mine.weight, *scales])
    assert taken / given.weight.numel() == pytest.approx(bytes_of_a_weight(codes, 1024), rel=1e-6)


def test_names_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperbagel.nn.quantized._check_library", lambda device: None)  # there may be no GPU
    assert numbers(None, CPU) == numbers("float32", CPU) == numbers(torch.float32, CPU) == (torch.float32, None)
    assert numbers(None, torch.device("cuda")) == numbers("bfloat16", CPU) == (torch.bfloat16, None)
    assert numbers("nf4", CPU) == (torch.float32, "nf4")
    assert numbers("int8", torch.device("cuda")) == (torch.bfloat16, "int8")
    for wrong in ("int4", torch.int8, "torch.nf4"):
        with pytest.raises(InputError, match=r"got dtype '(int4|int8|nf4)', expected one of float32, bfloat16, int8, nf4"):
            numbers(wrong, CPU)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized._library.cache_clear()
    assert cli.main(["generate", "a red circle", "-o", str(tmp_path / "a.png"), "--seed", "0", "--dtype", "nf4"]) == 2
    told = capsys.readouterr().err
    assert "pip install 'hyperbagel[quantized]'" in told and len(told.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_library_that_does_not_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes without its library for a CUDA version is imported, and fails at the first call."""

    def broken(*args: object, **how: object) -> None:
        raise RuntimeError("CUDA SETUP ERROR")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    with pytest.raises(InputError, match=r"which bitsandbytes cannot do on cpu .CUDA SETUP ERROR.; install its version"):
        numbers("nf4", CPU)


@pytest.mark.parametrize("codes", CODES)
def test_layers_do_not_move_without_their_scales(codes: Codes) -> None:
    with pytest.raises(NotImplementedError, match="load the model where it is to run"):
        nn.Sequential(layer(codes)[0]).to(torch.bfloat16)


@pytest.mark.parametrize("codes", CODES)
def test_a_change_merged_over_codes(codes: Codes) -> None:
    """One ordinary matrix: the unpacked one and the change."""
    mine, _ = layer(codes)
    change = LowRank(256, 320, 4)
    nn.init.normal_(change.lora_B.weight)
    x = torch.randn(3, 256)
    torch.testing.assert_close(MergedLinear(mine, change, 0.5)(x), AdaptedLinear(mine, change, 0.5)(x), atol=1e-4, rtol=1e-4)


def test_costs_of_drafting_are_kept_apart(quantised: HyperBagel, tmp_path: Path) -> None:
    plain = load_folder(model_folder("toybox"))[0]
    assert KeptCosts(tmp_path, plain).setting["how"] != KeptCosts(tmp_path, quantised.parts.model).setting["how"]


@pytest.mark.parametrize("drafter", ["none", "block"])
def test_steps_of_fixed_shapes(quantised: HyperBagel, drafter: str) -> None:
    """As with --graphs; eagerly on a CPU."""
    fixed = HyperBagel(quantised.parts, "toybox", drafters=model_folder("toybox") / "drafters", graphs=True)
    question = "Is there a red car in the picture?"
    asked = {"max_tokens": 12, "drafter": drafter}
    assert fixed.ask(question, **asked).text == quantised.ask(question, **asked).text


def test_the_decoder_alone_is_quantised(quantised: HyperBagel) -> None:
    model = quantised.parts.model
    found = {name for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    expected = {n for n, part in model.language_model.model.layers.named_modules() if isinstance(part, nn.Linear)}
    assert found == {f"language_model.model.layers.{name}" for name in expected} and len(found) == 2 * 7 * 8
    kinds = {p.dtype for name, p in model.named_parameters() if name.rpartition(".")[0] not in found}
    assert kinds == {torch.float32}


def test_a_quantised_model_equals_the_unpacked_one(quantised: HyperBagel) -> None:
    """A picture of the teacher, an edit of a student and an answer."""
    parts = Parts.load(model_folder("toybox"), codes=quantised.parts.model.codes)
    student = load_student(model_folder("toybox") / "students" / "1", parts.model)
    other = HyperBagel(replace(parts, model=plainly(parts.model)), "toybox")
    other.students.ready["1"] = Ready(student.network(other.parts.model), student.sampler)  # it would be refused: other weights

    def work(model: HyperBagel) -> tuple[np.ndarray, str]:
        [first] = model.generate("a red car to the left of a blue key", seed=0, steps=6)
        [second] = model.edit(first.image, "make the car green", seed=2, student="1")
        answer = model.ask("Describe the picture in detail.", [first.image], drafter="none")
        return np.stack([np.asarray(x.image, dtype=np.int16) for x in (first, second)]), answer.text

    (mine, said), (theirs, wanted) = work(quantised), work(other)
    assert (
        np.abs(mine - theirs).max() <= (1 if quantised.parts.model.codes == "nf4" else 4) and said == wanted
    )  # int8: some products in bf16


def test_students_planners_and_drafters_know_their_model(quantised: HyperBagel) -> None:
    """They are told by the weights as they were, so those of the checkpoint fit."""
    assert fingerprint(quantised.parts.model) == fingerprint(load_folder(model_folder("toybox"))[0])
    network = quantised.students.get("1").network.model
    adapted = network.language_model.model.layers[0].self_attn.q_proj_moe_gen
    assert isinstance(adapted.base, QuantizedLinear)  # factors beside the codes: no matrix of its own
    planning = quantised.planner.get()[0].language_model.model.layers[0].self_attn.q_proj
    assert isinstance(planning, AdaptedLinear) and isinstance(planning.base, QuantizedLinear)
    answers = [quantised.ask("Describe the picture in detail.", drafter=name, max_tokens=40) for name in ("none", "block")]
    assert answers[0].text == answers[1].text
    assert answers[1].tau is not None and answers[1].tau > 1.5


def test_in_bf16_as_on_a_gpu(quantised: HyperBagel) -> None:
    """Codes of bf16 weights, products in bf16: pictures are those of fp32 up to rounding, and students, a plan and a drafter work."""
    folder = model_folder("toybox")
    parts = Parts.load(folder, dtype=torch.bfloat16, codes=quantised.parts.model.codes)
    coarse = HyperBagel(parts, "toybox", students=folder / "students", drafters=folder / "drafters", planner=folder / "planner")
    asked = {"seed": 0, "student": "6"}
    mine, theirs = (np.asarray(m.generate("a red circle", **asked)[0].image, dtype=np.int16) for m in (coarse, quantised))
    assert np.abs(mine - theirs).mean() < 2
    planned = coarse.generate("two red circles", seed=1, student="1", think=True, drafter="block")[0]
    assert planned.thinking and planned.drafter == "block"


def test_a_student_of_whole_layers_over_codes(quantised: HyperBagel, tmp_path: Path) -> None:
    """Its own layers are ordinary ones, with its own values."""
    base = load_folder(model_folder("toybox"))[0]
    student = Student.fresh(base, make_adapter(base, "full"), Sampler(nfe=2))
    with torch.no_grad():
        for p in student.adapter.parameters():
            p.mul_(1.01)
    save_student(tmp_path / "full", student, base)
    network = quantised.students.get(str(tmp_path / "full")).network.model
    store_by_columns(base)
    own = network.language_model.model.layers[3].self_attn.o_proj_moe_gen
    assert type(own) is nn.Linear
    assert torch.equal(own.weight, base.language_model.model.layers[3].self_attn.o_proj_moe_gen.weight * 1.01)
    assert quantised.generate("a red circle", seed=0, student=str(tmp_path / "full"))[0].nfe == 2


def test_results_say_so(tmp_path: Path, quantised: HyperBagel, capsys: pytest.CaptureFixture[str]) -> None:
    codes = quantised.parts.model.codes
    assert quantised.generate("a red circle", seed=0, student="1")[0].settings["dtype"] == codes
    assert numbers_of(quantised)["dtype"] == f"float32+{codes}"
    path = tmp_path / "a.png"
    assert cli.main(["generate", "a red circle", "-o", str(path), "--seed", "0", "--student", "1", "--dtype", str(codes), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"][0]["settings"]["dtype"] == codes


def test_inspect_tells_what_each_takes(quantised: HyperBagel) -> None:
    report = inspect_folder(model_folder("toybox"))
    told, cpu = report["MB on a GPU as"], report["MB on a CPU as"]
    assert list(told) == ["float32", "bfloat16", *CODES]
    assert told["float32"] > told["bfloat16"] > told["int8"] > told["nf4"]
    held, outer = 0.0, 0  # as on a GPU, where what is not in codes is in bf16
    for part in quantised.parts.model.modules():
        codes = isinstance(part, QuantizedLinear)
        held += sum(p.numel() * 2 for p in part.parameters(recurse=False) if not (codes and p is part.weight))
        held += part.in_features * part.out_features * bytes_of_a_weight(part.kind, part.in_features) if codes else 0
        outer += sum(p.numel() for p in part.parameters(recurse=False) if not (codes and p is part.weight))
    held += 4 * sum(p.numel() for p in quantised.parts.vae.parameters())
    assert told[quantised.parts.model.codes] == round(held / 1e6)
    assert cpu[quantised.parts.model.codes] == round((held + 2 * outer) / 1e6)  # in fp32
    assert all(cpu[name] == told[name] for name in ("float32", "bfloat16"))
