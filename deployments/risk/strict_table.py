"""Tables of a configuration file read into frozen dataclasses: a misspelt key is never a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
import math
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class PolicyError(ValueError):
    """The risk policy is not valid."""


def merge_tables(table: Mapping[str, Any], overrides: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Lay overrides over a table, key by key; what is not a key of it is left for the reader to refuse."""
    merged = dict(table)
    for key, value in overrides.items():
        old = table.get(key)
        if isinstance(old, Mapping):
            if not isinstance(value, Mapping):
                raise PolicyError(f"{place}{key} is a table, not {value!r}.")
            merged[key] = merge_tables(old, value, f"{place}{key}.")
        else:
            merged[key] = value
    return merged


def read_table(kind: type[T], raw: object, place: str = "") -> T:
    """Read a table into a dataclass, tables in it into theirs.

    Raises PolicyError, naming the key, for one that is missing, unknown or of the wrong kind.
    """
    if not isinstance(raw, Mapping):
        raise PolicyError(f"{place.rstrip('.')} is a table, not {raw!r}.")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in raw if key not in names):
        raise PolicyError(f"Unknown in the risk policy: {', '.join(place + key for key in unknown)}.")
    if missing := [name for name in names if name not in raw]:
        raise PolicyError(f"Missing from the risk policy: {', '.join(place + name for name in missing)}.")
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{name: _value(hints[name], raw[name], place + name) for name in names})


def _value(kind: object, raw: object, key: str) -> object:
    """Check one value against its annotation; an integer passes for a float, a boolean for nothing else."""
    if isinstance(kind, type) and is_dataclass(kind):
        return read_table(kind, raw, f"{key}.")
    if str in get_args(kind):  # a number, or a name
        kind = str if isinstance(raw, str) else get_args(kind)[0]
    if get_origin(kind) is tuple and isinstance(raw, list | tuple):
        return tuple(_value(get_args(kind)[0], item, key) for item in raw)
    if get_origin(kind) is Annotated:
        return _share(raw, key)
    if isinstance(kind, type) and issubclass(kind, StrEnum) and isinstance(raw, str) and raw in list(kind):
        return kind(raw)
    if kind is float:
        return _number(raw, key)
    if kind in {int, bool, str} and type(raw) is kind:
        return raw
    raise PolicyError(f"{key} cannot be {raw!r}.")


def _share(raw: object, key: str) -> float:
    number = _number(raw, key)
    if not 0.0 <= number <= 1.0:
        raise PolicyError(f"{key} must be from 0 to 1, not {raw!r}.")
    return number


def _number(raw: object, key: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        raise PolicyError(f"{key} must be a number, not {raw!r}.")
    return float(raw)
