"""The planner of a loaded model; read when a plan is first written."""

from __future__ import annotations

import warnings
from pathlib import Path

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.students import merges
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.planner import load_planner
from hyperbagel.nn.lora import attach
from hyperbagel.nn.projections import store_by_columns


class Planner:
    """Who writes plans: the model in FOLDER with its planner's changes or, without one, the model itself."""

    def __init__(self, base: Bagel, folder: Path | None = None, graphs: GraphRunner | None = None) -> None:
        """folder: need not be there. graphs: the runner of the model itself, if it decodes in fixed shapes."""
        self.base, self.folder, self.graphs = base, folder, graphs
        self.ready: tuple[Bagel, GraphRunner | None] | None = None
        self.asked: dict[str, str] = {}  # for the settings in a picture's metadata: what was asked for, if anything

    def get(self) -> tuple[Bagel, GraphRunner | None]:
        """The network that writes plans, which shares the model's tensors, and its runner. Warns (Notice) of a planner that cannot be used
        and goes on without."""
        if self.ready is None:
            ready = self.base, self.graphs
            if self.folder is not None and self.folder.is_dir():
                try:
                    ready = self._with(self.folder)
                except InputError as error:
                    warnings.warn(f"{error}; planning without it", Notice, stacklevel=4)
            self.ready = ready  # not before: without memory for it, the next request tries again
        return self.ready

    def ask_for(self, name: str) -> None:
        """Reads the planner now, since it was asked for by `name`. Raises InputError if it cannot be used."""
        if self.folder is not None:
            self.ready = self._with(self.folder)
        self.asked = {"planner": name}

    @property
    def runner(self) -> GraphRunner | None:
        """The runner of a planner that has been read, if it has one of its own."""
        return None if self.ready is None or self.ready[0] is self.base else self.ready[1]

    def _with(self, folder: Path) -> tuple[Bagel, GraphRunner | None]:
        planner = load_planner(folder, self.base, self.base.dtype).requires_grad_(False)
        network = attach(self.base, planner, merged=merges(self.base))
        store_by_columns(network)
        return network, None if self.graphs is None else GraphRunner(network, compiler=self.graphs.compiler, keep=self.graphs.keep)
