"""The drafters of a loaded model, by name; read when they are first asked for."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from hyperbagel.core.errors import InputError, Notice
from hyperbagel.core.files import shelf
from hyperbagel.generate.graphs import GraphRunner
from hyperbagel.generate.session import Parts, Session
from hyperbagel.speculative.adaptive import Adaptive
from hyperbagel.speculative.budget import best_depth
from hyperbagel.speculative.drafters.block import BlockDrafter
from hyperbagel.speculative.drafters.folder import Module, load_module, make_drafter, read_acceptance
from hyperbagel.speculative.drafters.lookup import Lookup
from hyperbagel.speculative.kept_costs import KeptCosts, cache_folder
from hyperbagel.speculative.types import Drafter

LOOKUP, AUTO, NONE = "lookup", "auto", "none"
DEPTH = 10  # most tokens of a chain, as in the paper; the budget decides how many are drafted
NODES = 15  # most tokens of a block's tree: 16 are read with the root
LOOKUP_PRIOR = (0.4, 0.6, 0.7)  # rising with depth: a wrong place shows at once, a right one goes on being right


class Drafters:
    """Names: "lookup" needs no training; another name means FOLDER/name; a path is a folder; "auto" is the fastest, lookup included."""

    def __init__(self, parts: Parts, folder: Path | None = None, graphs: GraphRunner | None = None) -> None:
        """graphs: the runner that verifies drafts when requests are served; None: eager."""
        self.parts, self.folder, self.graphs = parts, folder, graphs
        self.modules: dict[str, Module] = {}
        self.lookup = Lookup()
        self.ready: dict[tuple[str, int], Drafter] = {}
        self.serving: dict[str, Adaptive] = {}
        self.kept: KeptCosts | None = None

    def keep_costs(self) -> None:
        """Budgets made from now on take what drafting costs from disk, if it was measured here less than a day ago, or put it there."""
        folder = cache_folder()
        self.kept = None if folder is None else KeptCosts(folder, self.parts.model, self.graphs is not None)

    def shipped(self) -> list[str]:
        """Names of the drafters that came with the model."""
        return shelf(self.folder, "drafter.json")

    def names(self) -> list[str]:
        """All names that can be given without a folder."""
        return [*self.shipped(), LOOKUP, AUTO, NONE]

    def default(self, sampled: bool = False) -> str:
        """The drafter if none is named: auto if drafters came with the model, but none with graphs, which were asked for, and none where
        text is sampled and a seed would not repeat it."""
        if self.graphs is not None or not self.shipped():
            return NONE
        return NONE if sampled and not self.repeats(self.budgeted(AUTO)) else AUTO

    def repeats(self, drafter: Drafter) -> bool:
        """Whether a seed's sampled text is the same with this drafter as without one: in fp32, if its drafts are a choice."""
        return self.parts.model.dtype == torch.float32 and not drafter.draws

    def check(self, name: str | None) -> None:
        """Raises InputError for a name that means nothing. Reads nothing."""
        if name not in (None, NONE, AUTO, LOOKUP):
            self.find(str(name))

    def find(self, name: str) -> Path:
        """The folder of a trained drafter. Raises InputError for a name that means nothing."""
        if self.folder is not None and name in self.shipped():
            return self.folder / name
        if Path(name).is_dir():
            return Path(name)
        known = ", ".join(self.names())
        raise InputError(f"got drafter {name!r}, expected one of {known}, or a drafter folder (train one: hyperbagel train drafter)")

    def get(self, name: str, nodes: int = 0) -> Drafter:
        """The drafter alone, without a budget: it drafts as deep as it can, chains or (`nodes` > 0) trees of so many nodes.

        Raises InputError if it is damaged or of another target.
        """
        if name == LOOKUP:
            return self.lookup
        if (name, nodes) not in self.ready:
            self.ready[name, nodes] = make_drafter(self.module(name), self.parts.model, depth=DEPTH, nodes=nodes)
        return self.ready[name, nodes]

    def module(self, name: str) -> Module:
        """The weights of a trained drafter. Raises InputError as `get` does."""
        if name not in self.modules:
            self.modules[name] = load_module(self.find(name), self.parts.model)
        return self.modules[name]

    def served(self, name: str) -> Drafter:
        """The drafter as requests have it: one pass of a block makes a tree as it makes a chain; others need a pass for each token."""
        return self.get(name, NODES if name != LOOKUP and isinstance(self.module(name), BlockDrafter) else 0)

    def budgeted(self, name: str) -> Adaptive:
        """The drafter with a budget, as requests are served. Raises InputError as `get` does; "auto" warns of what it cannot use."""
        if name not in self.serving:
            self.serving[name] = self._auto() if name == AUTO else self._budgeted([name])
        return self.serving[name]

    def _budgeted(self, names: list[str]) -> Adaptive:
        priors = {name: LOOKUP_PRIOR if name == LOOKUP else read_acceptance(self.find(name)) for name in names}
        drafters = {name: self.served(name) for name in names}
        return Adaptive(drafters, {name: rates for name, rates in priors.items() if rates}, graphs=self.graphs, kept=self.kept)

    def _auto(self) -> Adaptive:
        """Lookup, and of the trained drafters the one that promises most by its costs here and its acceptance in training."""
        fitting = []
        for name in self.shipped():
            try:
                self.module(name)
                fitting.append(name)
            except InputError as error:
                warnings.warn(f"{error}; going on without it", Notice, stacklevel=4)
        if len(fitting) > 1:
            trial = self._budgeted(fitting)
            costs = trial.prepare(Session.new(self.parts), 1)
            promised = {name: best_depth(costs, name, trial.expected_rates(name))[1] for name in fitting}
            fitting = [max(promised, key=lambda name: promised[name])]
        return self._budgeted([*fitting, LOOKUP])
