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
from pathlib import Path
from typing import Any

import torch

from hyperbagel import __version__
from hyperbagel.core.errors import InputError
from hyperbagel.core.files import atomic_write_text, make_folder, read_json
from hyperbagel.model.bagel import Bagel
from hyperbagel.speculative.budget import Costs, DraftCost
from hyperbagel.speculative.types import Drafter

BELIEVED = 24 * 3600.0  # seconds: the machine may have been busy when it was measured, or have changed since


def cache_folder() -> Path | None:
    """$HYPERBAGEL_CACHE, else hyperbagel in $XDG_CACHE_HOME or ~/.cache; None for a user without a home."""
    own, caches = os.environ.get("HYPERBAGEL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    try:
        return Path(caches or Path.home() / ".cache") / "hyperbagel"
    except RuntimeError:
        return None


class KeptCosts:
    """The costs of a model's drafters on this machine, a file for each set of drafters and batch size."""

    def __init__(self, folder: Path, model: Bagel, graphs: bool = False) -> None:
        device = model.device
        self.folder = folder
        self.about: dict[str, Any] = {  # all that times depend on; of weights only their shapes
            "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "versions": [__version__, torch.__version__],
            "model": model.config.model_dump(mode="json"),
            "how": [str(model.dtype), model.language_model.model.attention, graphs],
        }

    def load(self, drafters: Mapping[str, Drafter], rows: int, sampled: bool) -> Costs | None:
        """What was measured here less than a day ago, if anything was."""
        about = self._about(drafters, rows, sampled)
        path = self._path(about)
        try:
            found = read_json(path)
            if found["about"] != about or not 0 <= time.time() - path.stat().st_mtime < BELIEVED:
                return None
            verify = tuple((int(n), float(seconds)) for n, seconds in found["verify"])
            draft = {name: DraftCost(*map(float, seconds)) for name, seconds in found["draft"].items()}
        except (InputError, OSError, LookupError, TypeError, ValueError, AttributeError):
            return None
        sound = [n for n, _ in verify] == sorted({n for n, _ in verify}) and all(seconds > 0 for _, seconds in verify)
        return Costs(verify, draft) if sound and verify and verify[0][0] == 1 and set(draft) == set(drafters) else None

    def save(self, drafters: Mapping[str, Drafter], rows: int, sampled: bool, costs: Costs) -> None:
        """Keeps them if the folder can be written: otherwise nothing is lost but the time of measuring again."""
        about = self._about(drafters, rows, sampled)
        draft = {name: [cost.first, cost.more, cost.start] for name, cost in costs.draft.items()}
        with suppress(InputError, OSError):
            make_folder(self.folder)
            atomic_write_text(self._path(about), json.dumps({"about": about, "verify": costs.verify, "draft": draft}, indent=1) + "\n")

    def _about(self, drafters: Mapping[str, Drafter], rows: int, sampled: bool) -> dict[str, Any]:
        whose = {name: [type(drafter).__name__, drafter.depth, drafter.width, list(drafter.taps)] for name, drafter in drafters.items()}
        for name, drafter in drafters.items():
            module = getattr(drafter, "module", None)
            if module is not None:
                whose[name].append(module.config.model_dump(mode="json"))
        return json.loads(json.dumps(self.about | {"drafters": whose, "rows": rows, "sampled": sampled}))  # as a file gives it back

    def _path(self, about: Mapping[str, Any]) -> Path:
        return self.folder / f"costs-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.json"
