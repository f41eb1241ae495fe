"""The search is exact: it finds what numpy finds, under every filter."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from serve_app.domain.assessment import Neighbours, ReferenceFilter
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import Conflict
from serve_app.records.references import ReferenceStore
from tests.serve_app.records.conftest import reference_image

LICENCES = ("CC-0", "CC-BY", "CC-BY-NC")
SITES = ("head/neck", "torso", None)


@pytest.fixture(scope="module")
async def loaded(owner_pool, unit_vectors):
    """900 images of 300 lesions in clusters; some lesions unknown, some vectors equal."""
    rng = np.random.default_rng(7)
    vectors = unit_vectors(900, seed=1) * 0.7 + np.repeat(unit_vectors(30, seed=2), 30, axis=0)
    vectors[100:110] = vectors[100]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    images = [
        reference_image(
            number,
            lesion_id=None if number % 5 == 0 else f"IL_{number // 3}",
            diagnosis=TRAINED[rng.integers(8)],
            diagnosis_confirm_type="histopathology" if number % 2 else None,
            age_approx=None if number % 7 == 0 else 50,
            anatom_site_general=SITES[rng.integers(3)],
            copyright_license=LICENCES[rng.integers(3)],
        )
        for number in range(900)
    ]
    await ReferenceStore(owner_pool).load(images, vectors, embedding_space="exact")
    return images, vectors


def _expected(images, vectors, query, k, limits):
    half, asked = vectors.astype(np.float16).astype(np.float64), query.astype(np.float16).astype(np.float64)
    cosine = half @ asked / np.linalg.norm(half, axis=1) / np.linalg.norm(asked)
    allowed = [
        i
        for i, image in enumerate(images)
        if (not limits.licences or image.copyright_license in limits.licences)
        and (not limits.sites or image.anatom_site_general in limits.sites)
        and (not limits.confirmed_only or image.diagnosis_confirm_type is not None)
        and (not limits.diagnoses or image.diagnosis in limits.diagnoses)
    ]
    ranked = sorted(allowed, key=lambda i: (-round(cosine[i], 6), images[i].isic_id))
    lesions, similar = set(), []
    for i in ranked:
        lesion = images[i].lesion_id or images[i].isic_id
        if lesion not in lesions:
            lesions.add(lesion)
            similar.append(i)
    benign = next((i for i in ranked if images[i].diagnosis not in MALIGNANT), None)
    malignant = next((i for i in ranked if images[i].diagnosis in MALIGNANT), None)
    return similar[:k], benign, malignant, cosine


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(
    seed=st.integers(0, 2**31),
    near=st.integers(0, 899) | st.none(),
    k=st.sampled_from([1, 10, 50]) | st.integers(1, 50),
    licences=st.lists(st.sampled_from([*LICENCES, "none such"]), unique=True, max_size=2),
    sites=st.lists(st.sampled_from(["head/neck", "torso"]), unique=True, max_size=2),
    confirmed=st.booleans(),
    diagnoses=st.lists(st.sampled_from(Diagnosis), unique=True, max_size=3),
)
async def test_the_search_is_exact(
    loaded, references, unit_vectors, seed, near, k, licences, sites, confirmed, diagnoses
) -> None:
    images, vectors = loaded
    query = unit_vectors(1, seed=seed)[0] if near is None else vectors[near]
    limits = ReferenceFilter(tuple(licences), tuple(sites), confirmed, tuple(diagnoses))
    found = await references.nearest(query, embedding_space="exact", k=k, reference_filter=limits)
    similar, benign, malignant, cosine = _expected(images, vectors, query, k, limits)
    places = {image.isic_id: place for place, image in enumerate(images)}

    def same(case, place) -> bool:
        # Cosines that differ in the last bits only may change places.
        return case.isic_id == images[place].isic_id or abs(case.similarity - cosine[place]) < 1e-6

    assert len(found.similar) == len(similar)
    assert all(map(same, found.similar, similar))
    for case in found.similar:
        assert case.similarity == pytest.approx(cosine[places[case.isic_id]], abs=1e-6)
    similarities = [case.similarity for case in found.similar]
    assert similarities == sorted(similarities, reverse=True)
    lesions = [case.lesion_id or case.isic_id for case in found.similar]
    assert len(set(lesions)) == len(lesions)
    for case, place in ((found.nearest_benign, benign), (found.nearest_malignant, malignant)):
        assert (case is None) == (place is None)
        assert case is None or same(case, place)
    if similar:
        share = np.mean([case.diagnosis in MALIGNANT for case in found.similar])
        assert found.malignant_share == pytest.approx(share)


async def test_equals_come_in_the_order_of_their_ids(loaded, references) -> None:
    images, vectors = loaded
    found = await references.nearest(vectors[100], embedding_space="exact", k=10)
    equal = [case for case in found.similar if case.similarity > 1 - 1e-9]
    assert len(equal) > 3
    assert [case.isic_id for case in equal] == sorted(case.isic_id for case in equal)
    assert equal[0].isic_id == images[100].isic_id
    again = await references.nearest(vectors[100], embedding_space="exact", k=10)
    assert again == found


async def test_metadata_comes_along_and_an_empty_space_has_no_neighbours(loaded, references) -> None:
    images, vectors = loaded
    found = await references.nearest(vectors[33], embedding_space="exact", k=1)
    (case,) = found.similar
    assert all(getattr(case, name) == getattr(images[33], name) for name in images[33].__dataclass_fields__)
    assert await references.nearest(vectors[33], embedding_space="nowhere", k=1) == Neighbours(
        (), None, None, None
    )


async def test_a_crowd_of_one_lesion_hides_no_other(owner_pool, references, loaded, unit_vectors) -> None:
    images, _ = loaded
    near, far = unit_vectors(2, seed=5)
    crowd = [
        replace(images[1], isic_id=f"CROWD_{i}", lesion_id="IL_crowd", diagnosis=Diagnosis.NV)
        for i in range(300)
    ]
    others = [
        replace(images[1], isic_id=f"OTHER_{i}", lesion_id=f"IL_other_{i}", diagnosis=Diagnosis.MEL)
        for i in range(12)
    ]
    vectors = np.vstack([np.tile(near, (300, 1)), np.tile(far, (12, 1))])
    await ReferenceStore(owner_pool).load([*crowd, *others], vectors, embedding_space="crowded")
    found = await references.nearest(near, embedding_space="crowded", k=10)
    assert [case.isic_id for case in found.similar] == ["CROWD_0", *sorted(o.isic_id for o in others)[:9]]
    assert found.nearest_malignant.isic_id == "OTHER_0"
    assert found.malignant_share == pytest.approx(0.9)
    everything = await references.nearest(near, embedding_space="crowded", k=50)
    assert len(everything.similar) == 13


async def test_loading_again_updates_and_reaches_other_spaces(
    owner_pool, references, loaded, unit_vectors
) -> None:
    images, _ = loaded
    vectors = unit_vectors(2, seed=11)
    store = ReferenceStore(owner_pool)

    async def names(space: str, **limits: object) -> set[str]:
        found = await references.nearest(
            vectors[0], embedding_space=space, k=2, reference_filter=ReferenceFilter(**limits)
        )
        return {case.isic_id for case in found.similar}

    two = [replace(image, isic_id=f"TWO_{n}", diagnosis=Diagnosis.NV) for n, image in enumerate(images[:2])]
    for space in ("old", "new"):
        await store.load(two, vectors, embedding_space=space)
    assert await names("old", confirmed_only=True) == {"TWO_1"}
    changed = [replace(two[0], diagnosis=Diagnosis.MEL, diagnosis_confirm_type="histo"), two[1]]
    await store.load(changed, vectors[::-1].copy(), embedding_space="new")
    new = await references.nearest(vectors[1], embedding_space="new", k=1)
    old = await references.nearest(vectors[0], embedding_space="old", k=1)
    assert new.similar[0].isic_id == old.similar[0].isic_id == "TWO_0"
    assert old.nearest_malignant == old.similar[0]
    for space in ("old", "new"):
        assert await references.count(space) == 2
        assert await names(space, diagnoses=(Diagnosis.MEL,)) == {"TWO_0"}
        assert await names(space, diagnoses=(Diagnosis.NV,)) == {"TWO_1"}
        assert await names(space, confirmed_only=True) == {"TWO_0", "TWO_1"}


async def test_bad_references_are_refused_whole(owner_pool, references, loaded, unit_vectors) -> None:
    images, vectors = loaded
    store = ReferenceStore(owner_pool)
    for bad in ({"copyright_license": ""}, {"copyright_license": "CC-BY-SA"}, {"diagnosis": Diagnosis.UNK}):
        with pytest.raises(Conflict):
            await store.load([images[0], replace(images[1], **bad)], vectors[:2], embedding_space="bad")
    for wrong in (vectors[:2], vectors[:1] * 2, np.full((1, 512), np.nan, np.float32)):
        with pytest.raises(ValueError, match="mbeddings"):
            await store.load(images[:1], wrong, embedding_space="bad")
    assert await references.count("bad") == 0
    assert await references.count("exact") == len(images)
