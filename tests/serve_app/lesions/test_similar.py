"""The confirmed cases like an image on record, under any filter: found, refused, and once in the audit log."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import pytest

from serve_app.domain.assessment import EVERY_REFERENCE, ReferenceFilter, SimilarCase
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.records.references import ReferenceStore
from tests.serve_app.erasure.erasing import path, uploaded

DR = ("clinician",)


async def ask(
    service, answer: dict[str, Any], params: Any = None, *, subject: str = "dr", roles: tuple[str, ...] = DR
) -> httpx.Response:
    return await service.client.get(
        f"{path(answer)}/similar", params=params, headers=service.token(subject, roles)
    )


async def found(service, answer: dict[str, Any], params: Any = None) -> dict[str, Any]:
    response = await ask(service, answer, params)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    service.hold_to("SimilarCasesDocument", body)
    return body


async def nearest(service, answer: dict[str, Any], k: int, limits: ReferenceFilter) -> dict[str, Any]:
    """What the store finds, exactly, of the same references."""
    row = await service.owner.fetchrow(
        "SELECT embedding, embedding_space FROM lesion_embeddings WHERE image_id = $1",
        UUID(answer["image_id"]),
    )
    store = ReferenceStore(service.owner, exact_below=10**9)
    neighbours = await store.nearest(
        row["embedding"].to_numpy().astype(np.float32),
        embedding_space=row["embedding_space"],
        k=k,
        reference_filter=limits,
    )
    return asdict(neighbours)


def same(shown: dict[str, Any] | None, case: dict[str, Any] | None) -> bool:
    if shown is None or case is None:
        return shown is case
    return {name: shown[name] for name in SimilarCase.__dataclass_fields__} == case


@pytest.fixture(scope="module")
async def assessed(service) -> dict[str, Any]:
    """An image with its answer; its neighbours are of more than one diagnosis."""
    answer = await uploaded(service)
    assert answer["outcome"] in {"decided", "review"}
    return answer


async def test_without_a_filter_it_is_what_the_assessment_found(service, assessed) -> None:
    shown = (await found(service, assessed))["similar"]
    assert shown == assessed["similar"]
    before = await service.counts()
    # As many as an assessment weighs.
    response = await ask(service, assessed, {"top_k": 16})
    body = response.json()
    assert body["similar"][:10] == shown
    assert body == {
        "lesion_id": assessed["lesion_id"],
        "image_id": assessed["image_id"],
        "embedding_space": assessed["provenance"]["embedding_space"],
        "similar": body["similar"],
        "neighbours": assessed["neighbours"],
    }
    (event,) = await service.events(response)
    assert (event["action"], event["actor"], event["outcome"]) == ("read", "dr", "success")
    assert event["patient_id"] == assessed["patient_id"]
    assert [str(event[name]) for name in ("lesion_id", "image_id")] == [
        assessed[name] for name in ("lesion_id", "image_id")
    ]
    assert event["detail"] == {"search": "similar"}
    assert await service.counts() == {**before, "audit_events": before["audit_events"] + 1}


@pytest.mark.parametrize(
    ("params", "limits"),
    [
        ({"top_k": "3"}, EVERY_REFERENCE),
        ({"diagnosis": "DF", "top_k": "50"}, ReferenceFilter(diagnoses=(Diagnosis.DF,))),
        ({"diagnosis": ["NV", "BKL", "NV"]}, ReferenceFilter(diagnoses=(Diagnosis.NV, Diagnosis.BKL))),
        ({"anatom_site_general": "head/neck"}, ReferenceFilter(sites=("head/neck",))),
        (
            {"anatom_site_general": ["anterior torso", "palms/soles"], "diagnosis": "NV"},
            ReferenceFilter(sites=("anterior torso", "palms/soles"), diagnoses=(Diagnosis.NV,)),
        ),
        ({"licence": ["CC-0", "CC-BY-NC"]}, ReferenceFilter(licences=("CC-0", "CC-BY-NC"))),
        (
            {"confirmed": "true", "diagnosis": "AK"},
            ReferenceFilter(confirmed_only=True, diagnoses=(Diagnosis.AK,)),
        ),
    ],
    ids=str,
)
async def test_every_filter_limits_all_that_is_shown(service, assessed, params, limits) -> None:
    k = int(params.get("top_k", 10))
    body, wanted = (
        await found(service, assessed, params),
        await nearest(service, assessed, k, limits),
    )
    assert body["similar"]
    assert len(body["similar"]) == len(wanted["similar"]) <= k
    assert all(map(same, body["similar"], wanted["similar"]))
    shown = body["neighbours"]
    assert shown["malignant_share"] == wanted["malignant_share"]
    assert same(shown["nearest_benign"], wanted["nearest_benign"])
    assert same(shown["nearest_malignant"], wanted["nearest_malignant"])


async def test_a_filter_of_one_kind_leaves_no_nearest_of_the_other(service, assessed) -> None:
    benign = [diagnosis for diagnosis in TRAINED if diagnosis not in MALIGNANT]
    for kinds, share, none in (
        (benign, 0.0, "nearest_malignant"),
        (list(MALIGNANT), 1.0, "nearest_benign"),
    ):
        body = await found(service, assessed, {"diagnosis": kinds})
        assert len(body["similar"]) == 10
        assert body["neighbours"]["malignant_share"] == share
        assert body["neighbours"][none] is None


async def test_the_upload_knows_no_filter_by_diagnosis_or_site(service) -> None:
    operation = service.document["paths"]["/api/lesions"]["post"]
    assert {one["name"] for one in operation["parameters"] if one["in"] == "query"} == {
        *("top_k", "licence", "confirmed"),
    }
    for asked in ({"diagnosis": "DF"}, {"anatom_site_general": "palms/soles"}):
        response = await service.upload(await service.care(), params=asked)
        service.hold_to_problem(response, 422, "invalid_field")


@pytest.mark.parametrize(
    "params",
    [
        {"diagnosis": "UNK"},
        {"diagnosis": ["MEL", "melanoma"]},
        {"licence": "GPL"},
        {"anatom_site_general": "elbow"},
        {"top_k": "51"},
    ],
    ids=str,
)
async def test_an_unknown_value_is_a_clear_problem(service, assessed, params) -> None:
    response = await ask(service, assessed, params)
    body = service.hold_to_problem(response, 422, "invalid_field")
    assert body["detail"].startswith(f"{next(iter(params))}: ")
    assert "melanoma" not in body["detail"]
    (event,) = await service.events(response)
    assert (event["action"], event["outcome"]) == ("read", "failed")
    assert event["detail"] == {"code": "invalid_field"}
