"""Recipes: a YAML file plus `a.b=value` overrides, checked by pydantic. An unknown key is an error that names its nearest neighbour."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hyperbagel.core.errors import InputError


class Config(BaseModel):
    """Base class of all settings: unknown keys are refused, and values are validated on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=())


C = TypeVar("C", bound=Config)


def load_config(cls: type[C], path: Path | str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> C:
    """Read `path` (YAML; None means all defaults), apply `a.b=value` overrides in order and check the whole against `cls`.

    Raises:
        InputError: unreadable file, broken YAML, unknown key, wrong type; names the key and the file.
    """
    source = "the settings" if path is None else f"{path} with the settings given" if overrides else str(path)
    values = read_yaml(Path(path)) if path is not None else {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise InputError(f"override: got {text!r}, expected key=value or group.key=value, add what is missing")
        _put(values, key.split("."), _parse(cls, key.split("."), value), text)
    return check_config(cls, values, source)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises InputError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: got an unreadable file ({error}), expected a YAML recipe, check the path") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: got broken YAML ({' '.join(str(error).split())}), expected key: value lines, correct it") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: got a {type(values).__name__} at the top, expected key: value lines, correct it")
    return values


def check_config(cls: type[C], values: dict[str, Any], source: str) -> C:
    """`cls` from plain values, with pydantic's complaints turned into one InputError that names each key and `source`."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_explain(cls, detail) for detail in error.errors()]
        raise InputError(f"{source}: " + "; ".join(lines)) from error


def refuse_unknown(kind: type[BaseModel], value: Any) -> Any:
    """For a "before" validator: returns `value` unchanged, or raises ValueError for a key that `kind` does not define.

    The shapes of model.config ignore extra keys, since a checkpoint's files carry some; in a recipe the same key is a typo.
    """
    for key in sorted(set(value) - set(kind.model_fields)) if isinstance(value, dict) else ():
        near = difflib.get_close_matches(str(key), kind.model_fields, n=1, cutoff=0.5)
        raise ValueError(f"unknown key {key!r}, {f'did you mean {near[0]!r}?' if near else 'use one of ' + ', '.join(kind.model_fields)}")
    return value


def check_weights(weights: dict[str, float] | None, known: Iterable[str], what: str) -> None:
    """Checks sampling weights by name (None: the defaults). Raises ValueError for an unknown name, a negative weight or a sum of 0."""
    if weights is None:
        return
    if odd := sorted(set(weights) - set(known)):
        raise ValueError(f"unknown {what} {odd[0]!r}, use some of {', '.join(known)}")
    if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"got weights {weights} of {what}, expected none below 0 and a sum above it")


def changed(settings: BaseModel, names: Iterable[str]) -> list[str]:
    """Those of `names` whose values differ from their defaults. Holds after `dump_config` as well, which writes every key."""
    return [name for name in names if getattr(settings, name) != type(settings).model_fields[name].get_default(call_default_factory=True)]


def dump_config(config: Config) -> str:
    """The resolved settings as YAML, in the order of the class; `load_config` of it gives the same settings."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(cls: type[Config], detail: Any) -> str:
    """One of pydantic's complaints as got, expected, what to do."""
    loc = [str(part) for part in detail["loc"]]
    name = ".".join(loc) or "settings"
    if detail["type"] == "extra_forbidden":
        owner = _model_at(cls, loc[:-1])
        valid = list(owner.model_fields) if owner is not None else []
        near = difflib.get_close_matches(loc[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*loc[:-1], near[0]])!r}?" if near else f"use one of {', '.join(valid)}" if valid else "remove it"
        return f"got unknown key {name!r}, expected a known one, {hint}"
    if detail["type"] == "missing":  # pydantic's input is then the whole enclosing mapping
        return f"{name}: got nothing, expected a value, add the key"
    if detail["type"] == "value_error":  # a rule over several keys: the message names them
        return f"{name}: {detail['ctx']['error']}, correct it"
    return f"{name}: got {detail['input']!r}, {detail['msg'][:1].lower()}{detail['msg'][1:]}, correct it"


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union without None, or the annotation itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [a for a in typing.get_args(annotation) if a is not type(None)]
    return [annotation]


def _model_at(cls: type[Config], keys: list[str]) -> type[Config] | None:
    """The settings class reached by following `keys` from `cls`, through mappings and lists too; None if there is none."""
    found: Any = cls
    for key in keys:
        for member in _members(found):
            if isinstance(member, type) and issubclass(member, Config):
                found = member.model_fields[key].annotation if key in member.model_fields else None
                break
            if (origin := typing.get_origin(member)) in (dict, list, tuple):
                found = typing.get_args(member)[origin is dict]
                break
        else:
            return None
    return next((a for a in _members(found) if isinstance(a, type) and issubclass(a, Config)), None)


def _parse(cls: type[Config], keys: list[str], text: str) -> Any:
    """An override's value: raw text where the field is a string or path, else as YAML reads it (pydantic then types it)."""
    owner = _model_at(cls, keys[:-1])
    field = owner.model_fields.get(keys[-1]) if owner is not None else None
    members = _members(field.annotation) if field is not None else []
    if text not in ("null", "~") and any(a is str or a is Path for a in members):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {'.'.join(keys)}: got {text!r}, expected a YAML value, quote it") from error


def _put(values: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    """Sets values[k0][k1]... in place, making groups on the way. `text`: the override as written, for the error."""
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise InputError(f"override: got {text!r} but {key!r} is a plain value, expected a group of keys, check the name")
    values[keys[-1]] = value
