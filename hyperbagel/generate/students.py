"""The students of a loaded model, by name; read when they are first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyperbagel.core.errors import InputError
from hyperbagel.core.files import shelf
from hyperbagel.model.bagel import Bagel
from hyperbagel.model.student import Sampler, StudentNetwork, load_student, read_sampler
from hyperbagel.nn.projections import store_by_columns


@dataclass(frozen=True)
class Ready:
    """A student to sample from: shares the base's tensors."""

    network: StudentNetwork
    sampler: Sampler


def merges(base: Bagel) -> bool:
    """Whether an adapter's low-rank changes become matrices of their own: on a CPU, where small products cost most. On a GPU they stay
    factors, since merged, each student of a 7B would take 13 GB, as much as the expert that it changes, to save 4 % of the work. So they do
    over quantised matrices, which are there to save memory."""
    return base.device.type == "cpu" and base.codes is None


class Students:
    """`get("6")` reads FOLDER/6; `get("path/to/student")` reads that folder.

    merged: whether low-rank changes become matrices of their own. None: see `merges`.
    """

    def __init__(self, base: Bagel, folder: Path | None = None, merged: bool | None = None) -> None:
        self.base, self.folder = base, folder
        self.merged = merges(base) if merged is None else merged
        self.ready: dict[str, Ready] = {}

    def names(self) -> list[str]:
        """Names of the students that came with the model."""
        return shelf(self.folder, "sampler.json")

    def get(self, name: str) -> Ready:
        """The student, read at its first use. Raises InputError if there is none of that name, or if it is damaged or of another base."""
        if name not in self.ready:
            student = load_student(self.find(name), self.base, self.base.dtype).requires_grad_(False)
            network = student.network(self.base, merged=self.merged)
            store_by_columns(network.model)  # copied layers and factors too; merged weights of an attention become one matrix
            self.ready[name] = Ready(network, student.sampler)
        return self.ready[name]

    def sampler(self, name: str) -> Sampler:
        """How a student is sampled; its weights are not read. Raises InputError for a name that means nothing, or a damaged sampler."""
        return self.ready[name].sampler if name in self.ready else read_sampler(self.find(name))

    def find(self, name: str) -> Path:
        """The folder of a student. Raises InputError if there is none of that name."""
        if name in self.names():
            assert self.folder is not None
            return self.folder / name
        if name and Path(name).is_dir():
            return Path(name)
        known = ", ".join([*self.names(), "none"])
        raise InputError(f"got student {name!r}, expected one of {known}, or a student folder (train one: hyperbagel train cfg)")
