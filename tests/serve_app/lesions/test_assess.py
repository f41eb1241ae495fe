"""The answer to one image: shape, arithmetic, provenance, and that it can be had again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.version import service_version
from tests.serve_app.erasure.erasing import followed, row, uploaded

STAGES = {"preprocess", "classifier", "embedder", "retriever", "risk", "store", "total"}


async def test_an_image_is_answered_with_everything_the_contract_names(service, models, model_id) -> None:
    patient = await service.care()
    response = await service.upload(
        patient,
        encounter_id="e-1",
        anatom_site_general="posterior torso",
        age_approx="54",
        sex="other",
        history=json.dumps({"personal_melanoma": True, "immunosuppression": None}),
        checklist=json.dumps({"irregular_shape": True}),
    )
    assert response.status_code == 201, response.text
    answer = response.json()
    service.hold_to("AssessmentDocument", answer)
    assert response.headers["location"] == f"/api/lesions/{answer['lesion_id']}"
    assert response.headers["cache-control"] == "no-store"
    assert (answer["patient_id"], answer["encounter_id"]) == (patient, "e-1")
    assert answer["outcome"] in {"decided", "review"}
    assert bool(answer["reasons"]) == (answer["outcome"] == "review")
    assert all(reason["message"] and reason["action"] for reason in answer["reasons"])
    assert (answer["quality"]["width"], answer["quality"]["height"]) == (400, 300)
    found = answer["classification"]
    probabilities = found["probabilities"]
    assert list(probabilities) == list(Diagnosis)
    assert abs(sum(probabilities.values()) - 1) < 1e-9
    best = sorted(probabilities.values(), reverse=True)[:3]
    assert [entry["probability"] for entry in found["top3"]] == best
    assert all(probabilities[entry["diagnosis"]] == entry["probability"] for entry in found["top3"])
    assert all(entry["name"] == Diagnosis(entry["diagnosis"]).display_name for entry in found["top3"])
    assert Diagnosis.UNK not in found["prediction_set"]
    assert answer["change"] is None
    assert answer["risk"]["policy_version"] == answer["provenance"]["policy_version"]
    assert answer["risk"]["factors"]
    assert answer["provenance"]["model_id"] == model_id
    assert all(answer["provenance"].values())
    assert answer["provenance"]["service_version"] == service_version()
    assert service_version().startswith(f"{service.document['info']['version']}+g")
    assert set(answer["timings_ms"]) == STAGES
    assert all(0 <= value <= answer["timings_ms"]["total"] for value in answer["timings_ms"].values())
    similar = answer["similar"]
    assert len(similar) == len({case["isic_id"] for case in similar}) == 10
    for case in similar:
        assert case["diagnosis"] in set(Diagnosis) - {Diagnosis.UNK}
        assert case["copyright_license"]
        assert case["attribution"]
        assert case["isic_id"] in case["archive_url"]
        assert -1 <= case["similarity"] <= 1
    similarities = [case["similarity"] for case in similar]
    assert similarities == sorted(similarities, reverse=True)
    neighbours = answer["neighbours"]
    weighed = (await uploaded(service, params={"top_k": 16}))["similar"]
    share = sum(case["diagnosis"] in MALIGNANT for case in weighed) / 16
    assert neighbours["malignant_share"] == pytest.approx(share)
    assert neighbours["nearest_malignant"]["diagnosis"] in MALIGNANT
    assert neighbours["nearest_benign"]["diagnosis"] not in MALIGNANT
    nearest = {neighbours["nearest_malignant"]["isic_id"], neighbours["nearest_benign"]["isic_id"]}
    assert similar[0]["isic_id"] in nearest


async def test_what_is_asked_to_be_shown_changes_nothing_that_is_concluded(service, drawn_lesion) -> None:
    image, concluded = drawn_lesion(seed=5), []
    for params in (
        {},
        {"top_k": 1},
        {"top_k": 17},
        {"top_k": 50, "confirmed": "true"},
        {"top_k": 9, "licence": ["CC-0", "CC-BY-NC"]},
        {"licence": ["CC-0"]},
    ):
        answer = await uploaded(service, image=image, params=params)
        shown = [case["copyright_license"] for case in answer["similar"]]
        allowed = params.get("licence", ["CC-0", "CC-BY", "CC-BY-NC"])
        query = "SELECT count(*) FROM reference_images WHERE copyright_license = ANY($1)"
        there = await service.owner.fetchval(query, allowed)
        assert len(shown) == min(params.get("top_k", 10), there)
        assert set(shown) <= set(allowed)
        concluded.append({part: answer[part] for part in ("outcome", "reasons", "risk", "neighbours")})
    assert concluded == concluded[:1] * 6


async def test_only_confirmed_references_are_shown_when_asked_for(service) -> None:
    patient = await service.care()
    nearest = [case["isic_id"] for case in (await service.upload(patient)).json()["similar"][:3]]
    query = "SELECT isic_id, diagnosis_confirm_type FROM reference_images WHERE isic_id = ANY($1)"
    confirmed = [tuple(row) for row in await service.owner.fetch(query, nearest)]

    async def note(cases: list[tuple[str, str | None]]) -> None:
        image = "UPDATE reference_images SET diagnosis_confirm_type = $2 WHERE isic_id = $1"
        vector = "UPDATE reference_embeddings SET confirmed = $2 WHERE isic_id = $1"
        for isic_id, kind in cases:
            await service.owner.execute(image, isic_id, kind)
            await service.owner.execute(vector, isic_id, bool(kind))

    await note([(isic_id, None) for isic_id in nearest])
    every = (await service.upload(patient, params={"confirmed": "false"})).json()
    answer = (await service.upload(patient, params={"confirmed": "true"})).json()
    # A replay asks the same again: without the filter, its references would be others.
    replayed = (await service.replay(answer)).json()
    await note(confirmed)
    assert [case["isic_id"] for case in every["similar"][:3]] == nearest
    assert len(answer["similar"]) == 10
    assert not {case["isic_id"] for case in answer["similar"]} & set(nearest)
    assert all(case["diagnosis_confirm_type"] for case in answer["similar"])
    assert answer["neighbours"] == every["neighbours"]
    assert (replayed["verdict"], replayed["notes"]) == ("identical", [])


async def test_a_follow_up_says_what_changed(service, drawn_lesion) -> None:
    first = await uploaded(service)
    second = await followed(service, first, image=drawn_lesion(seed=3))
    service.hold_to("AssessmentDocument", second)
    assert second["lesion_id"] == first["lesion_id"]
    change = second["change"]
    assert change["since"] == first["created_at"]
    assert change["compared_image_id"] == first["image_id"]
    assert -1 <= change["similarity"] <= 1
    then, now = (answer["classification"]["probabilities"] for answer in (first, second))
    # Among the known eight: doubt about one of the images must not look like a change.
    moved = now["MEL"] / (1 - now["UNK"]) - then["MEL"] / (1 - then["UNK"])
    assert change["melanoma_probability_delta"] == pytest.approx(moved, abs=1e-9)
    same = (await followed(service, first, image=drawn_lesion(seed=3)))["change"]
    # The stored embedding is of half precision.
    assert same["similarity"] == pytest.approx(1, abs=2e-3)
    assert same["melanoma_probability_delta"] == pytest.approx(0, abs=1e-6)


async def test_one_upload_leaves_one_row_in_each_place(service) -> None:
    patient = await service.care()
    before = await service.counts()
    response = await service.upload(patient)
    after = await service.counts()
    added = {table: after[table] - before[table] for table in before if after[table] != before[table]}
    once = ("lesions", "lesion_images", "lesion_embeddings", "assessments")
    assert added == {**dict.fromkeys(once, 1), "audit_events": 2}
    upload, classify = await service.events(response)
    answer = response.json()
    for event in (upload, classify):
        assert (event["actor"], event["outcome"], event["patient_id"]) == ("dr", "success", patient)
        for name in ("lesion_id", "image_id", "assessment_id"):
            assert str(event[name]) == answer[name]
    assert (upload["action"], classify["action"]) == ("upload", "classify")
    assert classify["detail"]["model_id"] == answer["provenance"]["model_id"]
    sealed = (await row(service, answer))["sealed"]
    assert sealed.startswith(b"DERM")
    assert service.image[64:128] not in sealed


async def test_a_black_image_is_refused_and_kept(service, black) -> None:
    response = await service.upload(await service.care(), image=black)
    assert response.status_code == 201
    answer = response.json()
    service.hold_to("AssessmentDocument", answer)
    assert answer["outcome"] == "refused"
    assert not answer["quality"]["acceptable"]
    assert answer["reasons"]
    assert [answer[part] for part in ("classification", "risk", "neighbours", "change")] == [None] * 4
    assert answer["similar"] == []
    assert all(answer["provenance"].values())
    assert [event["action"] for event in await service.events(response)] == ["upload", "classify"]
    seen = (await service.get(response.headers["location"])).json()
    assert answer.pop("open_demand") is seen["open_demand"] is None
    assert seen["assessments"] == [answer]
    assert (await service.replay(answer)).json()["verdict"] == "identical"


async def test_every_original_of_the_archive_is_answered(start_service, local_stages, isic_dir: Path) -> None:
    # Every eighth: each is the same way, and megabytes long.
    files = sorted((isic_dir / "uploads").iterdir())[::8]
    assert files
    async with start_service(local_stages(answer_all=False)) as service:
        patient = await service.care()
        for path in files:
            response = await service.upload(patient, image=path.read_bytes(), name=path.name)
            assert response.status_code == 201, f"{path.name}: {response.text}"
            answer = response.json()
            service.hold_to("AssessmentDocument", answer)
            assert answer["outcome"] != "refused", f"{path.name}: {answer['reasons']}"
            assert abs(sum(answer["classification"]["probabilities"].values()) - 1) < 1e-9
            assert len(answer["similar"]) == 10
