"""The scripts that train everything go on where they were stopped, and pass on nothing that is not finished."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hyperbagel.evaluate.toybox import load_detector

ROOT = Path(__file__).parents[3]

# Stands in for Python and for the program: notes its words, begins a run folder, and is killed before the first checkpoint.
KILLED = """#!/bin/bash
echo "$@" >> "$NOTES"
while [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; shift; done
mkdir -p "$out" && echo '{}' > "$out/provenance.json"
exit 137
"""

# A drafter whose gate failed: all is written, the program says so.
GATED = """#!/bin/bash
echo "$@" >> "$NOTES"
while [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; shift; done
mkdir -p "$out/checkpoints" "$out/export" && touch "$out/gate-failed.json"
exit 2
"""


def launch(script: str, stand_in: str, folder: Path, *arguments: str, **settings: str) -> tuple[int, list[str]]:
    """(exit status, what the stand-in was told, one line a call)."""
    folder.mkdir(exist_ok=True)
    for name in ("python", "hyperbagel"):
        (folder / name).write_text(stand_in)
        (folder / name).chmod(0o755)
    notes = folder / "notes"
    environment = os.environ | {"BIN": str(folder), "NOTES": str(notes)} | settings
    done = subprocess.run(["bash", str(ROOT / "runs" / script), *arguments], env=environment, capture_output=True, timeout=60)
    return done.returncode, notes.read_text().splitlines()


def test_a_run_that_was_stopped_before_its_first_checkpoint_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        status, told = launch("toybox.sh", KILLED, tmp_path / "bin", str(tmp_path / "work"))
        assert status == 137
    assert len(told) == 2 and "--resume" not in told[0] and told[1].endswith("--resume")


def test_a_drafter_that_failed_its_gate_is_not_shipped(tmp_path: Path) -> None:
    settings = {"ONLY": "block", "NO_TABLES": "1", "SHIP": "block"}
    for _ in range(2):
        status, told = launch("drafters.sh", GATED, tmp_path / "bin", str(tmp_path / "model"), str(tmp_path / "out"), **settings)
        assert status == 2
    assert len(told) == 2 and not (tmp_path / "model" / "drafters").exists()


def test_the_detector_can_be_made_again(tmp_path: Path) -> None:
    """One batch, from nothing and from there: a file that evaluations load."""
    for more in ([], [str(tmp_path / "a.safetensors")]):
        out = tmp_path / f"{'b' if more else 'a'}.safetensors"
        command = [sys.executable, str(ROOT / "runs" / "detector.py"), str(out), "1", *more]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        load_detector(out)
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "b.safetensors").read_bytes()
