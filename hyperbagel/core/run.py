"""The run folder: everything needed to trust a figure and to reproduce it.

config.yaml (resolved), provenance.json (one entry per launch), metrics.jsonl (one line per logged step),
tensorboard/, samples/, checkpoints/.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hyperbagel.core.config import Config, dump_config
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_bytes, atomic_write_text, make_folder, read_json, readable_errors, sole_writer

_OWN = {"config.yaml", "provenance.json", "metrics.jsonl", "tensorboard", "samples", "checkpoints", ".lock"}  # what a run writes itself
_PACKAGES = ("hyperbagel", "torch", "numpy", "pillow", "safetensors", "tokenizers", "pydantic")


def git_sha(folder: Path) -> str | None:
    """Commit of the work tree that holds `folder`, with "+changes" if tracked files differ from it; None outside git."""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return sha.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line cut off by a kill is skipped. Raises InputError for a damaged one."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is incomplete
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path}: got a damaged line ({error}), expected JSON, restore the file") from error
    for line in found:
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise InputError(f"{path}: got a line without a step ({str(line)[:60]}), expected figures of one, restore the file")
    return found


def stage_of(config: Config) -> str:
    """The stage that a recipe belongs to: the file that defines its class."""
    return type(config).__module__.rpartition(".")[2]


def check_stage(path: Path, stage: str) -> None:
    """Raises InputError if the run in a folder is known to be of another stage."""
    launches = read_json(path / "provenance.json").get("launches")
    last = launches[-1] if isinstance(launches, list) and launches and isinstance(launches[-1], dict) else {}
    if (was := last.get("stage", stage)) != stage:
        raise InputError(f"{path}: got a run of stage {was}, expected one of stage {stage}; resume it as {was}")


def check_run_folder(path: Path, *, resume: bool) -> None:
    """Raises InputError if `path` already holds a run and `resume` is False, or holds none and `resume` is True."""
    holds = (path / "provenance.json").exists()
    if holds and not resume:
        raise InputError(f"{path}: got a folder that holds a run, expected a new one, give another folder or resume this one")
    if resume and not holds:
        raise InputError(f"{path}: got no run to resume, expected a run folder, check the path or start without resume")


class RunFolder:
    """The folder of one training run, locked against other processes while it is open; a `with` block closes it.

    Opening a new run writes its config and provenance; of a resumed one `rewind` does.
    """

    def __init__(self, path: Path | str, config: Config, *, seed: int, resume: bool = False, leads: bool = True) -> None:
        """
        Args:
            leads: False for all but one of several processes that train together; opening then neither locks nor writes anything.
        Raises:
            InputError: see `check_run_folder`; also if the folder cannot be written or another process trains in it.
        """
        self.path = Path(path)
        self._metrics: int | None = None
        self._board: Any = None
        self._lock = ExitStack()
        self._found: set[str] | None = None
        if not leads:
            return
        check_run_folder(self.path, resume=resume)
        self._found = set(os.listdir(self.path)) if self.path.is_dir() else None  # before this launch
        given = self.path / "config.yaml"  # perhaps the recipe of this very launch
        self._given = given.read_bytes() if given.is_file() else None
        make_folder(self.path)
        self._lock.enter_context(sole_writer(self.path / ".lock", f"{self.path}: got a run"))
        try:
            self._open(config, seed, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, config: Config, seed: int, resume: bool) -> None:
        provenance = self.path / "provenance.json"
        launches = read_json(provenance).get("launches") if resume else []
        if not isinstance(launches, list):
            raise InputError(f"{provenance}: got no list of launches, expected one, restore the file")
        launches.append(
            {
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": sys.argv,
                "stage": stage_of(config),
                "git": git_sha(Path(__file__).parent),
                "seed": seed,
                "versions": versions(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "settings": config.model_dump(mode="json"),
            }
        )
        self._about = {"config.yaml": dump_config(config), "provenance.json": json.dumps({"launches": launches}, indent=1)}
        if not resume:
            self._write_about()

    def _write_about(self) -> None:
        for name, text in self._about.items():
            atomic_write_text(self.path / name, text)

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def folder(self, name: str) -> Path:
        """A folder inside the run folder, made if absent."""
        return make_folder(self.path / name)

    def rewind(self, step: int) -> None:
        """Continues from `step`: writes this launch's settings and drops the metric lines beyond, which the run will write again."""
        self._write_about()
        kept = [line for line in read_metrics(self.metrics_path) if line["step"] <= step]
        atomic_write_text(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line {"step": ..., name: value, ...}, in one write call, so that a kill cuts at most that line. Not finite: null."""
        if self._metrics is None:
            with readable_errors(self.metrics_path):
                self._metrics = os.open(self.metrics_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a run that logs needs it

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        line = {"step": step, **{k: float(v) if math.isfinite(v) else None for k, v in values.items()}}
        os.write(self._metrics, (json.dumps(line) + "\n").encode())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def discard(self) -> None:
        """Closes the run and removes what this launch wrote: for one that was refused before it had done anything."""
        self.close()
        for name in _OWN - (self._found or set()):
            thing = self.path / name
            shutil.rmtree(thing) if thing.is_dir() else thing.unlink(missing_ok=True)
        if self._given is not None:
            atomic_write_bytes(self.path / "config.yaml", self._given)
        if self._found is None and not os.listdir(self.path):
            self.path.rmdir()

    def close(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
            self._board.close()
            self._metrics = self._board = None
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
