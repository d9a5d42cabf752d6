"""The loader's order is a pure function of its position: workers, ranks and resuming do not change it."""

import logging
import random
from collections import Counter
from dataclasses import dataclass

import pytest

from hyperbagel.core.errors import InputError
from hyperbagel.data.loader import BrokenRow, Loader, Phase, draw_source, read_group
from hyperbagel.data.plan import Sample, Text


@dataclass
class Numbers:
    """Sample i is the text [base + i]; indexes in `broken` cannot be read."""

    base: int
    broken: frozenset[int] = frozenset()
    rows: int = 0

    def __len__(self) -> int:
        return self.rows

    def sample(self, index: int) -> Sample:
        if index in self.broken or (self.rows and index % self.rows in self.broken):
            raise BrokenRow(f"row {index}")
        return [Text([self.base + index])]


PHASES = [Phase(20, {"a": 1.0, "b": 0.0}), Phase(None, {"a": 1.0, "b": 3.0})]


def make(**options: object) -> Loader:
    sources = {"a": Numbers(0), "b": Numbers(10_000)}
    return Loader(sources, PHASES, {"a": 2, "b": 3}, seed=5, **options)  # type: ignore[arg-type]


def take(loader: Loader, n: int) -> list[tuple[str, list[int]]]:
    groups = [loader.next_group() for _ in range(n)]
    return [(g.source, [item.ids[0] for sample in g.samples for item in sample if isinstance(item, Text)]) for g in groups]


def test_mixture_by_phase() -> None:
    groups = take(make(), 420)
    assert {name for name, _ in groups[:20]} == {"a"}
    shares = Counter(name for name, _ in groups[20:])
    assert abs(shares["b"] / 400 - 0.75) < 0.07
    assert [i for name, ids in groups for i in ids if name == "a"] == list(range(2 * sum(name == "a" for name, _ in groups)))


@pytest.mark.parametrize("options", [{"workers": 3}, {"workers": 1, "kind": "process"}])
def test_workers_change_nothing(options: dict[str, object]) -> None:
    loader = make(**options)
    try:
        assert take(loader, 40) == take(make(), 40)
    finally:
        loader.close()


def tell(source: str, samples: list[Sample], number: int) -> tuple[str, int, int]:
    return source, len(samples), number


@pytest.mark.parametrize("options", [{}, {"workers": 3}, {"workers": 1, "kind": "process"}])
def test_what_becomes_of_a_group_where_it_is_read(options: dict[str, object]) -> None:
    """`prepare` is given the group's number, also after resuming, and what it makes takes the samples' place."""
    loader = make(prepare=tell, **options)
    try:
        groups = [loader.next_group() for _ in range(30)]
        assert [g.made for g in groups] == [(g.source, {"a": 2, "b": 3}[g.source], n) for n, g in enumerate(groups)]
        assert not any(g.samples for g in groups)
        loader.load_state_dict(loader.state_dict())
        assert loader.next_group().made[2] == 30
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(workers: int) -> None:
    whole = take(make(), 50)
    loader = make(workers=workers)
    assert take(loader, 23) == whole[:23]
    state = loader.state_dict()
    other = make(workers=workers)
    take(other, 5)
    other.load_state_dict(state)
    assert take(other, 27) == whole[23:]
    assert take(loader, 27) == whole[23:]
    loader.close()
    other.close()


def test_ranks_share_the_stream() -> None:
    parts = [take(make(rank=rank, world=2), 30) for rank in range(2)]
    assert [name for name, _ in parts[0]] == [name for name, _ in parts[1]]
    both = sorted(i for part in parts for name, ids in part for i in ids if name == "a")
    assert both == list(range(len(both)))


def test_broken_rows_are_skipped_counted_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    loader = Loader({"a": Numbers(0, frozenset({1, 2, 30, 31, 32, 33}))}, [Phase(None, {"a": 1})], {"a": 4}, seed=0)
    with caplog.at_level(logging.WARNING):
        groups = take(loader, 10)
    assert groups[0][1] == [0, 3, 3, 3]  # the next whole row takes a broken one's place
    assert loader.broken["a"] > 5 and loader.state_dict()["broken"] == {"a": loader.broken["a"]}
    assert "row 1" in caplog.text and "only counted" in caplog.text and len(caplog.records) == 6


def test_all_broken_is_an_error() -> None:
    loader = Loader({"a": Numbers(0, frozenset(range(3)), rows=3)}, [Phase(None, {"a": 1})], {"a": 1}, seed=0)
    with pytest.raises(InputError, match="nothing but broken rows"):
        loader.next_group()


@pytest.mark.parametrize(("rows", "broken", "world"), [(2, 1, 1), (4, 2, 1), (4, 1, 4)])
def test_a_small_source_with_some_whole_rows_goes_on(rows: int, broken: int, world: int) -> None:
    """However the broken ones fall at the end of one pass and the beginning of the next."""

    @dataclass
    class Shuffled(Numbers):
        def sample(self, index: int) -> Sample:
            epoch, at = divmod(index, self.rows)
            order = random.Random(f"{self.base}/{epoch}").sample(range(self.rows), self.rows)
            return super().sample(order[at])

    for seed in range(20):
        for rank in range(world):
            found = read_group(Shuffled(seed, frozenset(range(broken)), rows=rows), "a", 0, 5, rank, world)
            assert len(found.samples) == 5


def test_an_error_in_a_worker_reaches_the_caller() -> None:
    loader = Loader({"a": Numbers(0, frozenset(range(3)), rows=3)}, [Phase(None, {"a": 1})], {"a": 1}, seed=0, workers=1)
    with pytest.raises(InputError, match="nothing but broken rows"):
        loader.next_group()
    loader.close()


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([], "no phase"),
        ([Phase(None, {"c": 1.0})], "'c'"),
        ([Phase(None, {"a": 0.0})], "one is > 0"),
        ([Phase(None, {"a": 2.0, "b": -1.0})], ">= 0"),
        ([Phase(5, {"a": 1.0}), Phase(5, {"a": 1.0})], "growing"),
    ],
)
def test_wrong_mixtures(phases: list[Phase], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Loader({"a": Numbers(0), "b": Numbers(1)}, phases, {"a": 1, "b": 1}, seed=0)


def test_a_foreign_position_is_refused() -> None:
    with pytest.raises(InputError, match="ranks"):
        make(world=2).load_state_dict(make().state_dict())


def test_a_phase_ends_before_its_number() -> None:
    phases = [Phase(1, {"a": 1.0}), Phase(3, {"b": 1.0}), Phase(None, {"a": 1.0})]
    assert [draw_source(phases, 5, n) for n in range(5)] == ["a", "b", "b", "a", "a"]


def test_broken_rows_are_counted_over_all_launches() -> None:
    def loader() -> Loader:
        return Loader({"a": Numbers(0, frozenset({1, 2, 9}))}, [Phase(None, {"a": 1})], {"a": 2}, seed=0)

    first, second = loader(), loader()
    take(first, 3)
    second.load_state_dict(first.state_dict())
    assert second.broken == first.broken == Counter(a=3)  # row 1's place asks for row 2 as well
    take(first, 2), take(second, 2)
    assert second.broken == first.broken == Counter(a=4)


def test_behind_broken_rows_ranks_still_read_rows_of_their_own() -> None:
    found = [read_group(Numbers(0, frozenset({2, 3})), "a", 0, 2, rank, 2) for rank in range(2)]
    assert [[sample[0].ids[0] for sample in group.samples] for group in found] == [[0, 4], [1, 5]]  # type: ignore[union-attr]


def test_broken_rows_are_counted_where_groups_are_prepared(caplog: pytest.LogCaptureFixture) -> None:
    loader = Loader({"a": Numbers(0, frozenset({1}))}, [Phase(None, {"a": 1})], {"a": 4}, seed=0, prepare=tell)
    loader.next_group()
    assert loader.broken == {"a": 1} and "row 1" in caplog.text
