"""Measured costs kept on disk for a day, so that a program that answers a single question need not measure what drafting costs first.

Measuring takes half a second for the embedded model, a short answer a tenth of that. Programs that go on measure for themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field

import hyperbagel
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_text, make_folder
from hyperbagel.model.bagel import Bagel
from hyperbagel.speculative.budget import Costs, DraftCost
from hyperbagel.speculative.types import Drafter

PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BELIEVED = 24 * 3600.0  # seconds: the machine may have been busy when it was measured, or have changed since


def cache_folder() -> Path | None:
    """$HYPERBAGEL_CACHE, else hyperbagel in $XDG_CACHE_HOME or ~/.cache; None for a user without a home."""
    own, caches = os.environ.get("HYPERBAGEL_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "hyperbagel"  # a relative one means nothing
    except RuntimeError:
        return None


def _young(path: Path) -> bool:
    return 0 <= time.time() - path.stat().st_mtime < BELIEVED


class _Kept(BaseModel):
    """A file's contents: seconds as in `Costs`, finite and none below zero."""

    about: dict[str, Any]
    verify: Annotated[list[tuple[int, PositiveSeconds]], Field(min_length=1)]
    draft: dict[str, tuple[Seconds, Seconds, Seconds]]

    def rising(self) -> bool:
        """Whether a plain step is there and reading more tokens never costs less."""
        tokens, seconds = zip(*self.verify, strict=True)
        return tokens[0] == 1 and list(tokens) == sorted(set(tokens)) and list(seconds) == sorted(seconds)


class KeptCosts:
    """The costs of a model's drafters on this machine, a file for each set of drafters and batch size."""

    def __init__(self, folder: Path, model: Bagel, graphs: bool = False) -> None:
        self.folder, self.model, self.graphs = folder, model, graphs

    @cached_property
    def setting(self) -> dict[str, Any]:
        """What times depend on besides drafters and batch size; of weights only their shapes. Looked up where something drafts."""
        model, device = self.model, self.model.device
        code = max((path.stat().st_mtime for path in Path(hyperbagel.__file__).parent.rglob("*.py")), default=0.0)
        return {
            "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
            "threads": [torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY")],
            "versions": [hyperbagel.__version__, code, torch.__version__],
            "model": model.config.model_dump(mode="json"),
            "how": [model.precision, model.language_model.model.attention, self.graphs],
        }

    def load(self, drafters: Mapping[str, Drafter], rows: int, sampled: bool) -> Costs | None:
        """What was measured here less than a day ago, if anything was."""
        about = self._about(drafters, rows, sampled)
        path = self._path(about)
        try:
            if not _young(path):
                return None
            found = _Kept.model_validate_json(path.read_bytes())
        except (OSError, ValueError):  # absent, or damaged: then it is measured and written again
            return None
        if found.about != about or set(found.draft) != set(drafters) or not found.rising():
            return None
        return Costs(tuple(found.verify), {name: DraftCost(*cost) for name, cost in found.draft.items()})

    def save(self, drafters: Mapping[str, Drafter], rows: int, sampled: bool, costs: Costs) -> None:
        """Keeps them if the folder can be written: otherwise nothing is lost but the time of measuring again."""
        about = self._about(drafters, rows, sampled)
        draft = {name: [cost.first, cost.more, cost.start] for name, cost in costs.draft.items()}
        with suppress(InputError, OSError):
            make_folder(self.folder)
            for path in self.folder.glob("costs-*.json"):
                if not _young(path):
                    path.unlink()
            atomic_write_text(self._path(about), json.dumps({"about": about, "verify": costs.verify, "draft": draft}, indent=1) + "\n")

    def _about(self, drafters: Mapping[str, Drafter], rows: int, sampled: bool) -> dict[str, Any]:
        whose = {name: [type(drafter).__name__, drafter.depth, drafter.width, list(drafter.taps)] for name, drafter in drafters.items()}
        for name, drafter in drafters.items():
            module = getattr(drafter, "module", None)
            if module is not None:
                whose[name].append(module.config.model_dump(mode="json"))
        return json.loads(json.dumps(self.setting | {"drafters": whose, "rows": rows, "sampled": sampled}))  # as a file gives it back

    def _path(self, about: Mapping[str, Any]) -> Path:
        return self.folder / f"costs-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.json"
