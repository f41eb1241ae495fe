"""The named invariants of what is stored: each holds always, and one that does not is somebody's to look at.

They hold by construction as well (constraints, one embedder a space, only licensed images fetched); this is
the check that construction has not failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from serve_app.records.pool import Pool, queries

_SQL = queries("health")

#: Query of health.sql, which counts what breaks it: the invariant in words, as they stand there.
INVARIANTS: Mapping[str, str] = MappingProxyType(
    {name: query.partition("\n")[0].removeprefix("-- ") for name, query in _SQL.items()}
)


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that does not hold: its name, its words, and how many rows break it."""

    name: str
    invariant: str
    count: int


async def find_violations(pool: Pool) -> list[Violation]:
    """Check every invariant; an empty list is what it should be. Reads the live space through: not for every request."""
    found = []
    for name, invariant in INVARIANTS.items():
        count: int = await pool.fetchval(_SQL[name])
        if count:
            found.append(Violation(name, invariant, count))
    return found
