"""The Dockerfile cannot be built in a test; what it takes from the repository is checked: files, pins, and the command that it starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hyperbagel.cli import app

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ").splitlines()
INSTRUCTIONS = [line.split(None, 1) for line in LINES if line.strip() and not line.startswith("#")]


def test_what_is_copied_is_there_and_let_through() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = [source for name, rest in INSTRUCTIONS if name == "COPY" for source in rest.split()[:-1]]
    assert len(copied) >= 4 and set(copied) == kept and all((ROOT / source).exists() for source in copied)


def test_versions_come_from_the_locks() -> None:
    for name in ("lock", "scale"):
        pins = [line for line in (ROOT / f"requirements/{name}.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", pin) for pin in pins)
        assert name == "scale" or sum(pin.startswith("torch==") for pin in pins) == 1, "grep finds one line"
    installs = [rest for name, rest in INSTRUCTIONS if name == "RUN"]
    for command in [part for rest in installs for part in rest.split("&&") if "pip install" in part]:
        assert "requirements/lock.txt" in command, command


def test_every_stage_is_defined_and_the_command_exists() -> None:
    stages = [rest.split() for name, rest in INSTRUCTIONS if name == "FROM"]
    names = {words[2] for words in stages}
    assert {"torch-cpu", "torch-cuda"} <= names
    for image, *_ in stages:
        assert image in ("python:${PYTHON}", "torch-${VARIANT}") or image in names
    said = dict(INSTRUCTIONS)
    assert json.loads(said["ENTRYPOINT"]) == ["hyperbagel"]
    assert json.loads(said["CMD"])[0] in {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
