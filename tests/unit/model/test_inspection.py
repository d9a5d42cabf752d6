"""Whether a model's weights fit into what is free is known before they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hyperbagel import cli
from hyperbagel.core.errors import InputError, Notice
from hyperbagel.core.hardware import free_bytes
from hyperbagel.model.inspection import check_memory, inspect_folder
from hyperbagel.pipeline import HyperBagel, model_folder

TOYBOX = model_folder("toybox")
CPU = torch.device("cpu")
HEAD = 4 * 1024 * 256  # bytes of the embedded model's head, which is there twice for a moment


def free(monkeypatch: pytest.MonkeyPatch, size: float | None) -> None:
    for module in ("core.hardware", "model.inspection"):
        monkeypatch.setattr(f"hyperbagel.{module}.free_bytes", lambda device: size if size is None else int(size))


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = inspect_folder(TOYBOX)["MB on a CPU as"]["int8"] * 1e6 + HEAD
    free(monkeypatch, needed + 1e6)
    monkeypatch.setattr("hyperbagel.generate.session.load_folder", lambda *args: pytest.fail("the weights were read"))
    assert cli.main(["ask", "What is two plus two?"]) == 2
    told = capsys.readouterr().err
    assert "as float32: got 0.0 GB of free memory on cpu, expected 0.1 GB, take int8 (0.0 GB) or nf4 (0.0 GB) as the dtype, free" in told
    free(monkeypatch, 1e6)
    assert cli.main(["ask", "What is two plus two?"]) == 2
    assert "expected 0.1 GB, free some memory or take a larger machine" in capsys.readouterr().err


def test_what_fits_and_what_is_only_mapped_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = inspect_folder(TOYBOX)["MB on a CPU as"]
    free(monkeypatch, (sizes["float32"] + 1) * 1e6 + HEAD)
    check_memory(TOYBOX, CPU, torch.float32, None)
    free(monkeypatch, (sizes["int8"] + 1) * 1e6 + HEAD)
    check_memory(TOYBOX, CPU, torch.bfloat16, "int8")
    free(monkeypatch, 0)
    check_memory(TOYBOX, CPU, torch.bfloat16, None)  # its own type: views of the file
    free(monkeypatch, None)
    check_memory(TOYBOX, CPU, torch.float32, None)


def test_a_drafter_that_does_not_fit_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HyperBagel.from_pretrained("toybox")
    free(monkeypatch, 1e6)
    for drafter in ("auto", "block"):
        with pytest.warns(
            Notice, match=r"block, drafter: got 0\.0 GB of free memory on cpu, expected 0\.0 GB, free some memory .*; going on"
        ):
            answer = model.ask("What is two plus two?", max_tokens=8, drafter=drafter)
        assert answer.text and answer.drafter != "block"
    with pytest.raises(InputError, match=r"students/6, student: got 0\.0 GB of free memory"):
        model.generate("a red circle", student="6")


def system(root: Path, limit: str) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\nSwapFree: 500 kB\nHugePages_Total: 0\n")
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, content in (("memory.max", limit), ("memory.current", "900000"), ("memory.stat", "anon 1\ninactive_file 100000\n")):
        (group / name).write_text(content)
    return root


def test_free_memory_of_a_machine_and_of_a_container(tmp_path: Path) -> None:
    assert free_bytes(CPU, system(tmp_path / "machine", "max\n")) == 3500 * 1024
    assert free_bytes(CPU, system(tmp_path / "container", "1000000\n")) == 200000
    assert free_bytes(CPU, system(tmp_path / "wide", "100000000\n")) == 3500 * 1024
    assert free_bytes(CPU, tmp_path / "another system") is None
    assert free_bytes(torch.device("xpu"), tmp_path / "machine") is None  # not of this kind


def test_free_memory_of_a_gpu_counts_what_pytorch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (700, 1000)), ("memory_reserved", 200), ("memory_allocated", 50)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 850
