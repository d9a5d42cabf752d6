"""Recipes are checked to the last key."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperbagel.core.config import Config, check_weights, dump_config, load_config
from hyperbagel.core.errors import InputError


class Inner(Config):
    rate: float = 0.1
    name: str = "x"


class Needy(Config):
    folder: Path
    steps: int = 3


class Outer(Config):
    steps: int = 3
    limit: float | None = 1.0
    folder: Path | None = None
    sizes: tuple[int, ...] = (1,)
    inner: Inner = Inner()


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps: 5\ninner: {rate: 1.0e-3}\n")
    got = load_config(Outer, path, ["inner.name=007", "steps=6", "steps=7", "limit=null", "sizes=[2, 3]", "inner.rate=2e-5", "folder=a=b"])
    assert (got.steps, got.limit, got.sizes, got.folder) == (7, None, (2, 3), Path("a=b"))
    assert (got.inner.rate, got.inner.name) == (2e-5, "007")


def test_dump_loads_to_the_same(tmp_path: Path) -> None:
    config = Outer(sizes=(4, 5), folder=Path("x"), inner=Inner(name="null"))
    path = tmp_path / "r.yaml"
    path.write_text(dump_config(config))
    assert load_config(Outer, path) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stps: 1", r"r\.yaml.*unknown key 'stps'.*did you mean 'steps'"),
        ("inner: {rat: 1}", r"unknown key 'inner\.rat'.*did you mean 'inner\.rate'"),
        ("zzz: 1", "use one of steps, limit"),
        ("steps: many", r"steps: got 'many'"),
        ("steps: [", "broken YAML"),
        ("- 1", "got a list at the top"),
    ],
)
def test_mistakes_name_key_and_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        load_config(Outer, path)


def test_a_missing_key_is_got_nothing() -> None:
    with pytest.raises(InputError) as caught:
        load_config(Needy, None, ["steps=5"])
    assert str(caught.value) == "the settings: folder: got nothing, expected a value, add the key"


@pytest.mark.parametrize("text", ["steps", "=3", "inner..rate=1", "steps.more=1"])
def test_bad_overrides(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps: 1")
    with pytest.raises(InputError, match="override"):
        load_config(Outer, path, [text])


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml.*check the path"):
        load_config(Outer, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": -1.0, "b": 3.0}, "none below 0"),
        ({"a": 0.0}, "a sum above"),
        ({}, "a sum above"),
        ({"c": 1.0}, "unknown kind 'c', use some of a, b"),
    ],
)
def test_weights_that_nothing_can_be_drawn_by(weights: dict[str, float], words: str) -> None:
    check_weights(None, "ab", "kind")
    check_weights({"a": 0.0, "b": 2.0}, "ab", "kind")
    with pytest.raises(ValueError, match=words):
        check_weights(weights, "ab", "kind")


def test_null_takes_a_path_away(tmp_path: Path) -> None:
    class Recipe(Config):
        init: Path | None = Path("a")
        name: str | None = "a"

    found = load_config(Recipe, None, ["init=null", "name=~"])
    assert found.init is None and found.name is None
