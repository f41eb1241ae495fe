"""Choosing N representative references: by diagnosis with a minimum each, then in proportion.

1. One image a lesion, unless several are asked for: the one of least rank.
2. Seats for the diagnoses: each gets its minimum (or all it has, where that is less), the rest goes in
   proportion to what is left of each, by largest remainder.
3. Within a diagnosis the images are ordered by skin type, site, sex and age band. A stratum gets its exact share
   of the seats, rounded so that no group (a skin type, a site of it, …) is off by one seat or more: cumulative
   rounding from a start drawn by the seed, the arithmetic of systematic sampling (Cochran 1977, ch. 8).
   Small strata are neither all dropped nor all taken, as rounding each alone would do.
4. Within a stratum the images of least rank.

An image's rank is a hash of seed and isic_id: it depends on nothing else, so an archive that grows changes the
selection where its shares move and where a new image ranks lower, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
import hashlib
from itertools import groupby

from data_jobs.references.catalogue import CatalogueEntry
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.patient import Sex

#: Upper ends of the age bands, years; the archive states ages in steps of five and clamps them at 85.
AGE_BANDS = (25, 40, 55, 70)


@dataclass(frozen=True, slots=True)
class Selection:
    """How many images are wanted, and how they are chosen.

    `minimum`: of each diagnosis; None is a fortieth of `count` (1,250 of 50,000).
    """

    count: int
    seed: int = 0
    minimum: int | None = None
    several_per_lesion: bool = False


def choose(candidates: Iterable[CatalogueEntry], selection: Selection) -> list[CatalogueEntry]:
    """Choose as many entries, fewer only when there are fewer; ordered by isic_id. Equal for equal input."""
    seed, count, minimum = selection.seed, selection.count, selection.minimum
    ranked = {entry.isic_id: (_rank(seed, entry.isic_id), entry) for entry in candidates}
    ordered = [entry for _, entry in sorted(ranked.values(), key=lambda pair: pair[0])]
    if not selection.several_per_lesion:
        lesions: dict[str, CatalogueEntry] = {}
        for entry in ordered:
            lesions.setdefault(entry.lesion, entry)
        ordered = list(lesions.values())
    of = {diagnosis: [entry for entry in ordered if entry.diagnosis is diagnosis] for diagnosis in TRAINED}
    available = {diagnosis: len(found) for diagnosis, found in of.items()}
    seats = share_seats(available, count, minimum=count // 40 if minimum is None else minimum)
    chosen = [
        entry
        for diagnosis, found in of.items()
        for entry in spread_over_strata(found, seats[diagnosis], seed=seed)
    ]
    return sorted(chosen, key=lambda entry: entry.isic_id)


def share_seats(available: dict[Diagnosis, int], count: int, *, minimum: int) -> dict[Diagnosis, int]:
    """How many of each diagnosis; never more than there are, `count` in all unless there are fewer."""
    count = min(count, sum(available.values()))
    present = sum(1 for there in available.values() if there)
    floor = min(minimum, count // present) if present else 0
    seats = {diagnosis: min(there, floor) for diagnosis, there in available.items()}
    left = {diagnosis: there - seats[diagnosis] for diagnosis, there in available.items()}
    free, total = count - sum(seats.values()), sum(left.values())
    if total:
        shares = {diagnosis: divmod(there * free, total) for diagnosis, there in left.items()}
        for diagnosis, (whole, _) in shares.items():
            seats[diagnosis] += whole
        # Python's sort is stable: equal remainders go in the order of the diagnoses.
        by_remainder = sorted(shares, key=lambda diagnosis: -shares[diagnosis][1])
        for diagnosis in by_remainder[: count - sum(seats.values())]:
            seats[diagnosis] += 1
    return seats


def spread_over_strata(ranked: list[CatalogueEntry], seats: int, *, seed: int) -> list[CatalogueEntry]:
    """Take `seats` of one diagnosis's entries, which come by rank, each stratum in proportion."""
    if not ranked:
        return []
    total = len(ranked)
    # The same fraction of the total, however large that is: a grown archive keeps its start.
    start = (_rank(seed, ranked[0].diagnosis) * total) >> 64
    chosen: list[CatalogueEntry] = []
    before = 0
    # Stable: within a stratum the order stays that of rank.
    for _, group in groupby(sorted(ranked, key=stratum), key=stratum):
        members = list(group)
        first, last = ((position * seats + start) // total for position in (before, before + len(members)))
        chosen += members[: last - first]
        before += len(members)
    return chosen


def stratum(entry: CatalogueEntry) -> tuple[str, str, str, int]:
    """Skin type, site, sex, age band; what is not known is a group of its own."""
    age = entry.age_approx
    band = -1 if age is None else sum(age > end for end in AGE_BANDS)
    sex = entry.sex if entry.sex in {Sex.FEMALE, Sex.MALE} else ""
    return (entry.fitzpatrick_skin_type or "", entry.anatom_site_general or "", sex, band)


def _rank(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")
