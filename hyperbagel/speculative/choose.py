"""The drafters of a loaded model, by name; read when they are first asked for."""

from __future__ import annotations

from pathlib import Path

from hyperbagel.core.errors import InputError
from hyperbagel.model.bagel import Bagel
from hyperbagel.speculative.drafters.folder import load_module, make_drafter
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.types import Drafter


class Drafters:
    """`get("lookup")` needs no training; `get("block")` reads FOLDER/block; `get("path/to/drafter")` reads that folder."""

    def __init__(self, target: Bagel, folder: Path | None = None) -> None:
        self.target, self.folder = target, folder
        self.ready: dict[str, Drafter] = {"lookup": Lookup()}

    def names(self) -> list[str]:
        """Those that work without another folder."""
        shipped = [] if self.folder is None or not self.folder.is_dir() else [path.name for path in self.folder.iterdir() if path.is_dir()]
        return ["lookup", *sorted(shipped)]

    def get(self, name: str) -> Drafter:
        """Raises InputError if there is none of that name, or if it is damaged or of another target."""
        if name not in self.ready:
            self.ready[name] = make_drafter(load_module(self.find(name), self.target), self.target)
        return self.ready[name]

    def find(self, name: str) -> Path:
        """The folder of a drafter. Raises InputError for a name that means nothing."""
        if self.folder is not None and name in self.names():
            return self.folder / name
        if Path(name).is_dir():
            return Path(name)
        known = ", ".join([*self.names(), "none"])
        raise InputError(f"got drafter {name!r}, expected one of {known}, or a drafter folder (train one: hyperbagel train drafter)")
