"""Which earlier lesion of the patient a new one is likeliest to be: asked, and nothing more."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from serve_app.audit.events import event_about
from serve_app.domain.assessment import Reason
from serve_app.domain.patient import AnatomSite, BodyPosition, BodyView, ClinicalContext
from serve_app.keys.receipts import ErasureReason
from serve_app.records.erasures import ErasureRequest, ErasureStore
from serve_app.records.lesion_rows import Admission
from serve_app.records.reviews import ReviewStore
from tests.serve_app.records.test_links import NOW, statement

BACK = ClinicalContext(AnatomSite.POSTERIOR_TORSO)


def at(x: float, y: float, view: BodyView = BodyView.POSTERIOR) -> ClinicalContext:
    return replace(BACK, position=BodyPosition(view, x, y))


async def test_the_likeliest_is_the_most_alike_and_the_nearest(
    lesions, admission, assessment, unit_vectors, space
) -> None:
    """Of the patient, at the same site, earlier; by its first; never what was linked once, or is."""
    patient, vectors = str(uuid4()), unit_vectors(8, seed=3)

    async def sent(day: int, vector: Any, context: ClinicalContext = BACK, **named: Any) -> Admission:
        code = named.pop("code", "low_margin")
        case = admission(
            **{"patient_id": patient, "created_at": NOW + timedelta(days=day), "context": context, **named}
        )
        await lesions.admit(case)
        done = assessment(embedding=vector, reasons=(Reason(code, "m", "a"),))
        await lesions.complete(
            case.assessment_id, done, embedding_space=space, event=event_about(case, "classify")
        )
        return case

    def alike(share: float, number: int) -> Any:
        mixed = share * vectors[0] + (1 - share**2) ** 0.5 * vectors[number]
        return mixed / (mixed @ mixed) ** 0.5

    async def likeliest(of: Admission) -> Any:
        return await lesions.likeliest(of.lesion_id, embedding_space=space)

    first = await sent(0, vectors[0], at(0.5, 0.5))
    assert await likeliest(first) is None
    await sent(1, vectors[0], replace(BACK, anatom_site_general=AnatomSite.HEAD_NECK))
    await sent(1, vectors[0], patient_id=str(uuid4()))
    await sent(1, vectors[0], ClinicalContext())
    near = await sent(2, alike(0.8, 1), at(0.31, 0.3))
    new = await sent(5, alike(0.9, 2), at(0.3, 0.3))
    await sent(9, alike(0.9, 2), at(0.3, 0.3))  # a later one is no earlier one
    found = await likeliest(new)
    # More alike by 0.1, and farther by 0.27.
    assert (found.lesion_id, found.image_id) == (near.lesion_id, near.image_id)
    assert found.distance == pytest.approx(0.01)
    assert found.similarity == pytest.approx(alike(0.8, 1) @ alike(0.9, 2), abs=2e-3)
    # Without a position of either in one view, what is most alike; one that is questioned, or erased, stands for no lesion.
    doubted = await sent(3, alike(0.9, 2), code="perhaps_another_lesion")
    gone = await sent(3, alike(0.9, 2))
    request = {"image_id": gone.image_id, "reason": ErasureReason.PATIENT_REQUEST, "actor": "chief"}
    await ErasureStore(lesions._pool).accept(ErasureRequest(lesion_id=gone.lesion_id, **request))
    for context in (BACK, at(0.3, 0.3, BodyView.LEFT_LATERAL)):
        plain = await sent(4, alike(0.9, 2), context)
        found = await likeliest(plain)
        assert (found.lesion_id, found.distance) == (first.lesion_id, None)
        assert found.similarity == pytest.approx(0.9, abs=2e-3)
        request = {"image_id": plain.image_id, "reason": ErasureReason.PATIENT_REQUEST, "actor": "chief"}
        await ErasureStore(lesions._pool).accept(ErasureRequest(lesion_id=plain.lesion_id, **request))
    # Of those that are linked, the first is what to link to.
    reviews = ReviewStore(lesions._pool)
    await reviews.link(statement(near.lesion_id, first.lesion_id))
    found = await likeliest(new)
    assert (found.lesion_id, found.image_id) == (first.lesion_id, near.image_id)
    # Confirmed to be its lesion's own, it stands for that.
    event = event_about(doubted, "confirm")
    await lesions.confirm(doubted.lesion_id, doubted.image_id, confirmed_by="dr", event=event)
    assert (await likeliest(new)).image_id == doubted.image_id
    await reviews.link(statement(new.lesion_id, doubted.lesion_id))
    assert await likeliest(new) is None
    # Whoever said that they are not one is not asked again.
    await reviews.unlink(statement(new.lesion_id))
    assert (await likeliest(new)).image_id == near.image_id
    # A lesion of two images is known by itself.
    await sent(21, vectors[5], lesion_id=new.lesion_id, new_lesion=False)
    assert await likeliest(new) is None
