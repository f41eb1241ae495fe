"""The named invariants of what is stored: each holds always, and one that does not is somebody's to look at.

They hold by construction as well (constraints, one embedder a space, only licensed images fetched); this is
the check that construction has not failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from serve_app.records.pool import Pool, queries

#: Query of health.sql, which counts what breaks it: the invariant in words.
INVARIANTS: Mapping[str, str] = MappingProxyType(
    {
        "references_licensed": "every reference is public and licensed, and found under that licence alone",
        "references_of_the_archive": "no patient image is in the reference tables",
        "live_vectors_of_unit_norm": "every live reference has a vector of norm 1",
        "live_space_holds_references": "the live space holds references",
        "live_space_of_the_live_model": "the live model filled the live space",
        "erased_images_leave_nothing": "no erased image has a vector or an answer",
        "erasures_proven": "every accepted erasure has its receipt within ten minutes",
    }
)

_SQL = queries("health")


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
