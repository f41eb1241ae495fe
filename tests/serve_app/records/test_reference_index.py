"""Where a space is large, an index finds what looking at all finds; what it cannot find is looked for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from serve_app.domain.assessment import ReferenceFilter
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.records import references
from serve_app.records.pool import queries
from serve_app.records.references import ReferenceStore, search_breadth
from tests.serve_app.records.conftest import reference_image

SPACE = "large"
EXACT_BELOW = 300
THREE_MALIGNANT = (Diagnosis.MEL, Diagnosis.BCC, Diagnosis.SCC)
SQL = queries("references")


@pytest.fixture(scope="module")
async def loaded(owner_pool, unit_vectors):
    """4000 images, half of them malignant, in clusters, two a lesion; nine in ten under CC-0."""
    rng = np.random.default_rng(3)
    vectors = unit_vectors(4000, seed=1) + np.repeat(unit_vectors(200, seed=2), 20, axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    images = [
        reference_image(
            number,
            isic_id=f"LARGE_{number:07d}",
            lesion_id=f"IL_{number // 2}",
            diagnosis=TRAINED[rng.integers(8)],
            diagnosis_confirm_type=None if number % 4 == 0 else "histo",
            anatom_site_general=("torso", "head/neck", None)[rng.integers(3)],
            copyright_license="CC-BY" if number % 10 == 0 else "CC-0",
        )
        for number in range(4000)
    ]
    store = ReferenceStore(owner_pool, exact_below=EXACT_BELOW)
    await store.load(images, vectors, embedding_space=SPACE)
    return images, vectors


@pytest.fixture
def indexed(pool, monkeypatch: pytest.MonkeyPatch) -> ReferenceStore:
    """As in a space twice as large, where an index pays for the same filters."""
    monkeypatch.setattr(references, "_STEP", references._STEP / 2)
    return ReferenceStore(pool, exact_below=EXACT_BELOW)


@pytest.fixture
def exact(pool) -> ReferenceStore:
    return ReferenceStore(pool, exact_below=10**9)


async def _indexes(pool) -> list[str]:
    rows = await pool.fetch(
        "SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid"
        " JOIN pg_am ON pg_am.oid = relam WHERE amname = 'hnsw' ORDER BY 1"
    )
    return [name for (name,) in rows]


def test_a_larger_index_is_walked_wider() -> None:
    assert [search_breadth(images) for images in (0, 38_400, 100_000, 400_000)] == [150, 150, 391, 1_000]


async def _scanned(
    pool,
    *,
    looked_through: list[bool],
    query: np.ndarray,
    licences: Sequence[str] = (),
    diagnoses: Sequence[str] = (),
) -> str:
    arguments = (query, SPACE, 10, licences, [], False, diagnoses, 64, looked_through)
    async with pool.connection() as connection, connection.transaction():
        await connection.execute(SQL["plan_for_parameters"], 150)
        plan = await connection.fetch(f"EXPLAIN {SQL['nearest']}", *arguments)
    return "\n".join(line for (line,) in plan if "Scan" in line or "Index Cond" in line)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"licences": ("CC-0",)},
        # One diagnosis is looked through, three of a kind are found by its index.
        {"diagnoses": (Diagnosis.MEL,)},
        {"diagnoses": THREE_MALIGNANT},
        {"diagnoses": THREE_MALIGNANT, "licences": ("CC-BY",)},
    ],
)
async def test_an_index_finds_what_looking_at_all_finds(loaded, indexed, exact, unit_vectors, limits) -> None:
    asked_for = {"embedding_space": SPACE, "k": 10, "reference_filter": ReferenceFilter(**limits)}
    found_again = asked = kinds = 0
    for query in (*unit_vectors(6, seed=8), *loaded[1][::500]):
        found = await indexed.nearest(query, **asked_for)
        wanted = await exact.nearest(query, **asked_for)
        assert len(found.similar) == len({case.lesion_id for case in found.similar}) == 10
        farthest = wanted.similar[-1].similarity - 1e-6
        found_again += sum(case.similarity >= farthest for case in found.similar)
        asked += 10
        kinds += found.nearest_benign == wanted.nearest_benign
        kinds += found.nearest_malignant == wanted.nearest_malignant
        assert found == await indexed.nearest(query, **asked_for)
    # Where all ten are of one kind, they lie twice as deep in its index.
    assert found_again / asked >= (0.99 if limits.get("diagnoses") != THREE_MALIGNANT else 0.97)
    assert kinds / (asked / 5) >= 0.95


async def test_the_indexes_are_used_where_they_pay(loaded, pool, unit_vectors) -> None:
    (query,) = unit_vectors(1, seed=8)
    for limits in ({}, {"licences": ["CC-0"]}, {"diagnoses": ["NV", "BKL", "DF", "MEL"]}):
        plan = await _scanned(pool, looked_through=[], query=query, **limits)
        assert "_malignant on reference_embeddings" in plan
        assert "_benign on reference_embeddings" in plan
        assert "Seq Scan" not in plan
    for limits in ({"licences": ["CC-BY"]}, {"licences": ["CC-BY"], "diagnoses": ["DF"]}):
        selective = await _scanned(pool, looked_through=[True, False], query=query, **limits)
        assert "reference_hnsw" not in selective
        assert "reference_embeddings_of_sort" in selective
    assert "(diagnosis = " in selective


@pytest.mark.parametrize(
    ("limits", "looked_through"),
    [
        ({}, []),
        ({"diagnoses": THREE_MALIGNANT}, [False]),
        ({"diagnoses": (Diagnosis.MEL, Diagnosis.BCC), "licences": ("CC-0",)}, [False, True]),
        ({"diagnoses": (*THREE_MALIGNANT, Diagnosis.NV), "sites": ("torso",)}, [False]),
    ],
    ids=str,
)
async def test_an_index_is_not_walked_for_a_few_diagnoses(
    loaded, indexed, unit_vectors, monkeypatch, limits, looked_through
) -> None:
    """However cheap its steps are: what is near may all be of another diagnosis."""
    search, ways = references._search, []

    async def watched(connection, asked, kinds):
        ways.append(sorted(kinds))
        return await search(connection, asked, kinds)

    monkeypatch.setattr(references, "_search", watched)
    monkeypatch.setattr(references, "_STEP", 1)
    (query,) = unit_vectors(1, seed=8)
    await indexed.nearest(query, embedding_space=SPACE, k=10, reference_filter=ReferenceFilter(**limits))
    assert ways[0] == looked_through


@pytest.mark.parametrize("counts", ["right", "wrong"])
async def test_of_a_rare_diagnosis_k_are_found_whichever_way(
    loaded, owner_pool, indexed, exact, unit_vectors, counts
) -> None:
    """Right counts have it looked through; wrong ones send the search to the index."""
    images, _ = loaded
    rare = ReferenceFilter(licences=("CC-BY",), diagnoses=(Diagnosis.VASC,))
    there = {
        image.lesion_id
        for image in images
        if image.diagnosis is Diagnosis.VASC and image.copyright_license == "CC-BY"
    }
    assert 25 < len(there) < 75
    if counts == "wrong":
        await owner_pool.execute("UPDATE reference_counts SET images = 90000 WHERE diagnosis = 'VASC'")
    try:
        for query in unit_vectors(4, seed=12):
            asked_for = {"embedding_space": SPACE, "k": 25, "reference_filter": rare}
            found = await indexed.nearest(query, **asked_for)
            assert len({case.lesion_id for case in found.similar}) == len(found.similar) == 25
            assert {case.diagnosis for case in found.similar} == {Diagnosis.VASC}
            assert {case.copyright_license for case in found.similar} == {"CC-BY"}
            assert (found.nearest_benign, found.nearest_malignant) == (found.similar[0], None)
            assert counts == "wrong" or found == await exact.nearest(query, **asked_for)
    finally:
        await owner_pool.execute(SQL["recount"])


async def test_only_large_spaces_are_indexed_and_once(loaded, owner_pool) -> None:
    images, vectors = loaded
    before = await _indexes(owner_pool)
    assert [name.rsplit("_", 1)[1] for name in before] == ["benign", "malignant"]
    store = ReferenceStore(owner_pool, exact_below=EXACT_BELOW)
    await store.load(images[:400], vectors[:400], embedding_space="small")
    await store.load(images[:1], vectors[:1], embedding_space=SPACE)
    assert await _indexes(owner_pool) == before


async def test_two_loaders_may_both_index(loaded, owner_pool, indexed) -> None:
    images, vectors = loaded
    store = ReferenceStore(owner_pool, exact_below=100)
    await asyncio.gather(
        *(store.load(images[:300], vectors[:300], embedding_space=space) for space in ("one", "two"))
    )
    assert len(await _indexes(owner_pool)) == 6
    for space in ("one", "two"):
        found = await indexed.nearest(vectors[7], embedding_space=space, k=1)
        assert found.similar[0].isic_id == images[7].isic_id
