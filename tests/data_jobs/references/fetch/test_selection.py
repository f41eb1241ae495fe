from __future__ import annotations

from collections import Counter
from functools import cache
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from data_jobs.references.catalogue import CatalogueEntry
from data_jobs.references.fetch.selection import Selection, choose, share_seats, spread_over_strata, stratum
from serve_app.domain.diagnosis import TRAINED, Diagnosis

SITES = (None, "head/neck", "posterior torso", "lower extremity")


def entry(number: int, diagnosis: str = "NV", **fields: Any) -> CatalogueEntry:
    isic_id = f"ISIC_{number:07}"
    return CatalogueEntry(
        isic_id=isic_id,
        diagnosis=Diagnosis(diagnosis),
        copyright_license="CC-0",
        attribution="Someone",
        path=f"images/{isic_id}.jpg",
        **fields,
    )


@cache
def crowd(count: int) -> list[CatalogueEntry]:
    """Entries as uneven as the archive: mostly naevi, few skin types known."""
    draw = random.Random(1)  # noqa: S311
    return [
        entry(
            number,
            draw.choices(TRAINED, [15, 66, 4, 1, 11, 1, 1, 1])[0],
            anatom_site_general=draw.choice(SITES),
            sex=draw.choice((None, "female", "male")),
            age_approx=draw.randrange(1, 18) * 5,
            fitzpatrick_skin_type=draw.choices((None, "II", "VI"), [80, 17, 3])[0],
        )
        for number in range(count)
    ]


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 10_000), min_size=8, max_size=8), st.integers(0, 60_000), st.integers(0, 2_000)
)
def test_seats_are_as_many_as_asked_for_and_leave_no_diagnosis_below_its_minimum(there, count, minimum):
    available = dict(zip(TRAINED, there, strict=True))
    seats = share_seats(available, count, minimum=minimum)
    assert sum(seats.values()) == min(count, sum(there))
    assert all(0 <= seats[diagnosis] <= available[diagnosis] for diagnosis in TRAINED)
    present = sum(1 for number in there if number)
    if present:
        floor = min(minimum, min(count, sum(there)) // present)
        assert all(seats[diagnosis] >= min(available[diagnosis], floor) for diagnosis in TRAINED)


@pytest.mark.parametrize("seed", range(2))
def test_every_group_has_its_share_to_less_than_one(seed):
    entries = [one for one in crowd(11_000)[:3000] if one.diagnosis is Diagnosis.NV]
    chosen = spread_over_strata(entries, 350, seed=seed)
    assert len(chosen) == 350
    for depth in (1, 2, 3, 4):
        there = Counter(stratum(one)[:depth] for one in entries)
        taken = Counter(stratum(one)[:depth] for one in chosen)
        for group, size in there.items():
            assert abs(taken[group] - size * 350 / len(entries)) < 1


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 300), st.integers(0, 400), st.integers(0, 5))
def test_as_many_as_asked_for_are_chosen_none_twice(there, count, seed):
    entries = crowd(300)[:there]
    chosen = choose(entries, Selection(count, seed))
    assert len(chosen) == min(there, count)
    assert len({one.isic_id for one in chosen}) == len(chosen)
    assert set(chosen) <= set(entries)


def test_the_order_of_the_candidates_does_not_matter_and_the_seed_does():
    entries = crowd(11_000)[:3000]
    chosen = choose(entries, Selection(400, seed=7))
    assert choose(entries[::-1] + entries[:10], Selection(400, seed=7)) == chosen
    assert choose(entries, Selection(400, seed=8)) != chosen


def test_one_image_a_lesion_unless_several_are_asked_for():
    entries = [entry(number, lesion_id=f"IL_{number // 4:07}") for number in range(400)]
    chosen = choose(entries, Selection(400, seed=1))
    assert len(chosen) == len({one.lesion_id for one in chosen}) == 100
    # Which of the four is nobody's first.
    assert len({int(one.isic_id[5:]) % 4 for one in chosen}) == 4
    assert len(choose(entries, Selection(400, seed=1, several_per_lesion=True))) == 400


def test_an_archive_that_grows_keeps_most_of_the_selection():
    entries = crowd(11_000)
    before = {one.isic_id for one in choose(entries[:10_000], Selection(2000, seed=3))}
    for grown in (10_100, 11_000):
        after = {one.isic_id for one in choose(entries[:grown], Selection(2000, seed=3))}
        # Were they drawn anew, 20 % of the 2,000 would be the same.
        assert len(before & after) / 2000 > 1 - 1.3 * (grown - 10_000) / 10_000 - 0.06
