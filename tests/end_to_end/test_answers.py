"""The whole graph on Ray Serve, asked over HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
import re
import ssl
import time
from uuid import uuid4

import asyncpg
import httpx
from joserfc import jwt
from joserfc.jwk import OctKey
import jsonschema
import pytest

from benchmarks.baseline import LocalStages
from cluster.node_files import read_service_environment
from cluster.postgres import PostgresState
from deployments.preprocess.decode import UploadLimits
from serve_app.domain.diagnosis import Diagnosis
from tests.cluster.tls_terminator import terminator
from tests.end_to_end.conftest import draw_original
from tests.serve_app.records.test_audit_chain import ASK_THE_SUSPECT

pytestmark = pytest.mark.ray
_VERIFY = "import sys; from cluster.cli import main; print('exit', main(['audit', 'verify', '--home', sys.argv[1]]))"


async def test_an_image_is_answered(pms, lesion_image, model_id) -> None:
    patient, image = await pms.care(), lesion_image()
    response = await pms.upload(patient, image, age_approx="50")
    assert response.status_code == 201, response.text
    answer = response.json()
    document = (await pms.client.get("/api/openapi.json", headers=pms.token())).json()
    schema = {"$ref": "#/components/schemas/AssessmentDocument", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer)
    assert response.headers["location"] == f"/api/lesions/{answer['lesion_id']}"
    assert answer["provenance"]["model_id"] == model_id
    assert all(answer["provenance"].values())
    assert await pms.original(answer) == image
    timeline = (await pms.client.get(response.headers["location"], headers=pms.token())).json()
    assert timeline["open_demand"] == answer.pop("open_demand")
    assert timeline["assessments"] == [answer]


async def test_what_was_uploaded_waits_for_its_clinician(pms, lesion_image) -> None:
    """With a clinician's impression from before the answer, and what only describes."""
    subject = f"dr-{uuid4().hex[:8]}"
    patient, headers = await pms.care(subject), pms.token(subject)
    described = {"skin_type": "IV", "device": "DermLite DL5", "impression": '{"diagnosis": "NV"}'}
    response = await pms.upload(patient, lesion_image(), headers=headers, **described)
    assert response.status_code == 201, response.text
    (item,) = (await pms.client.get("/api/worklist", headers=headers)).json()["items"]
    assert (item["image_id"], item["patient_id"]) == (response.json()["image_id"], patient)


async def test_a_follow_up_and_a_retry(pms, lesion_image) -> None:
    patient = await pms.care()
    first = (await pms.upload(patient, lesion_image())).json()
    headers = {"Idempotency-Key": "end-to-end"}
    sent = {"lesion_id": first["lesion_id"], "headers": headers}
    second = await pms.upload(patient, lesion_image(2), **sent)
    again = await pms.upload(patient, lesion_image(2), **sent)
    assert (second.status_code, again.status_code) == (201, 201)
    assert second.json() == again.json()
    if first["outcome"] != "refused" != second.json()["outcome"]:
        assert second.json()["change"]["compared_image_id"] == first["image_id"]


async def test_serve_and_plain_calls_agree(pms, lesion_image, models: Path, model_id: str) -> None:
    """The same image through every hop has the same probabilities as in one process."""
    stages = LocalStages(models=models, limits=UploadLimits(), threads=1, policy_version="2026-11.4")
    compared = 0
    for seed in range(1, 3):
        image = lesion_image(seed, (900, 700))
        prepared = await stages.prepare(model_id, image)
        expected = (await stages.classify(model_id, prepared.pixels)).classification
        answer = (await pms.upload(await pms.care(), image)).json()
        assert answer["quality"]["sharpness"] == pytest.approx(prepared.quality.sharpness, abs=1e-9)
        if answer["classification"] is None:
            assert expected.probabilities[Diagnosis.UNK] > 0.5
            continue
        found = answer["classification"]["probabilities"]
        assert found == pytest.approx(dict(expected.probabilities), abs=1e-6)
        assert answer["classification"]["prediction_set"] == list(expected.prediction_set)
        compared += 1
    assert compared


async def test_an_answer_changed_beside_the_audit_log_is_named_while_the_node_serves(
    pms, node, lesion_image
) -> None:
    answer = (await pms.upload(await pms.care(), lesion_image())).json()
    assessment = answer["assessment_id"]

    def verify() -> str:
        return node.run("-c", _VERIFY, str(node.home))

    sound = await asyncio.to_thread(verify)
    assert sound.endswith("exit 0\n"), sound
    assert " of them from before it held digests: nothing found" in sound
    change = "UPDATE assessments SET answer = {} WHERE assessment_id = $1::text::uuid"
    await pms.owner.execute(change.format("answer || '{\"more\": 1}'"), assessment)
    assert f"assessments {assessment}: is not what its event says" in await asyncio.to_thread(verify)
    await pms.owner.execute(change.format("answer - 'more'"), assessment)
    assert (await asyncio.to_thread(verify)).endswith("exit 0\n")


async def test_a_large_original_travels_by_reference(pms) -> None:
    """12 MB: above the 1.5 MB from which an argument goes through the object store."""
    image = draw_original(2000, seed=2000)
    response = await pms.upload(await pms.care(), image)
    assert response.status_code == 201, response.text
    answer = response.json()
    assert (answer["quality"]["width"], answer["quality"]["height"]) == (2000, 2000)
    assert await pms.original(answer) == image


async def test_a_rejection_keeps_its_shape_through_serve(pms, lesion_image) -> None:
    patient = await pms.care()
    sent = {
        "gif": (b"GIF89a" + bytes(100), 415, "unsupported_image"),
        "cut": (lesion_image()[:3000], 422, "undecodable_image"),
        "small": (lesion_image(1, (200, 200)), 422, "image_too_small"),
        "large": (b"\xff\xd8\xff" + bytes(21 * 1024 * 1024), 413, "too_large"),
    }
    for image, status, code in sent.values():
        response = await pms.upload(patient, image)
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == code
    assert await pms.owner.fetchval("SELECT count(*) FROM lesions WHERE patient_id = $1", patient) == 0


async def test_a_node_lets_in_no_name_of_its_own_and_no_token_for_years(pms) -> None:
    """Signed by the very issuer: as an operator's account, as the delivery, as another with a space; for ten years."""
    secret = read_service_environment(pms.node.home)["DERM_TOKEN_SECRET"]
    now = int(time.time())
    good = {
        "iss": "derm-cds",
        "aud": "derm-cds",
        "sub": "dr",
        "roles": ["clinician"],
        "iat": now,
        "exp": now + 600,
    }
    for changed, code in (
        *(({"sub": name}, "token_subject_refused") for name in ("os:root", "derm-cds:outbox", " dr")),
        ({"exp": now + 315_360_000}, "token_lifetime_refused"),
        ({}, None),
    ):
        signed = jwt.encode({"alg": "HS256"}, good | changed, OctKey.import_key(secret))
        answer = await pms.client.get("/api/openapi.json", headers={"Authorization": f"Bearer {signed}"})
        assert (answer.status_code, answer.json().get("code")) == (401 if code else 200, code)


async def test_an_emergency_that_was_not_justified_is_over_on_a_node(pms, lesion_image) -> None:
    patient, told = await pms.care(), {"reason": "unconscious in casualty"}
    lesion = (await pms.upload(patient, lesion_image())).json()["lesion_id"]
    in_emergency = pms.token("dr-glass")
    opened = await pms.client.post(
        "/api/emergency-access", json={"patient_id": patient, **told}, headers=in_emergency
    )
    url = f"/api/lesions/{lesion}"
    assert (await pms.client.get(url, headers=in_emergency)).status_code == 200
    judged = await pms.client.post(
        f"/api/emergency-access/{opened.json()['emergency_id']}/review",
        json={"outcome": "not_justified"},
        headers=pms.token("chief", "supervisor"),
    )
    assert judged.json()["ended_by"] == "chief"
    for _ in range(8):
        assert (await pms.client.get(url, headers=in_emergency)).status_code == 403


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/api/openapi.json", "/nothing", "/api/lesions"])
async def test_the_request_id_comes_back_once(pms, path: str) -> None:
    mine = await pms.client.get(path, headers={"X-Request-ID": "pms-1.a_b"})
    assert mine.headers.get_list("x-request-id") == ["pms-1.a_b"]
    for headers in ({}, pms.token()):
        response = await pms.client.get(path, headers=headers)
        (given,) = response.headers.get_list("x-request-id")
        if response.headers["content-type"] == "application/problem+json":
            assert response.json()["request_id"] == given


async def test_headers_and_request_ids_that_go_too_far_are_answered_in_our_words(pms) -> None:
    for headers in ({"X-A": "a" * 20_000}, {f"X-{number}": "a" for number in range(150)}):
        response = await pms.client.get("/healthz", headers=headers)
        assert (response.status_code, response.json()["code"]) == (431, "headers_too_large")
    for sent in ("x" * 65, "Jane Doe 1950"):
        response = await pms.client.head("/healthz", headers={"X-Request-ID": sent})
        assert (response.status_code, response.content) == (200, b"")
        (given,) = response.headers.get_list("x-request-id")
        assert given != sent


async def test_an_uploads_request_id_is_the_one_on_record(pms, lesion_image) -> None:
    """Where its form names nobody; any other comes back, and is not kept."""
    for sent, events in ((str(uuid4()), 2), ("pms-upload-7", 0)):
        response: httpx.Response = await pms.upload(
            await pms.care(), lesion_image(), headers={"X-Request-ID": sent}
        )
        assert response.headers.get_list("x-request-id") == [sent]
        query = "SELECT count(*) FROM audit_events WHERE request_id = $1"
        assert await pms.owner.fetchval(query, sent) == events


async def test_an_image_is_sent_and_read_through_the_documented_tls_terminator(
    pms, node, lesion_image, tmp_path
) -> None:
    patient = await pms.care()
    with terminator(tmp_path, api=node.port) as tls:
        options = {"verify": ssl.create_default_context(cafile=str(tls.authority)), "timeout": 60}
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{tls.port}", **options) as client:
            there = replace(pms, client=client)
            for image in (lesion_image(5), draw_original(1500, seed=5)):
                sent = await there.upload(patient, image)
                assert sent.status_code == 201, sent.text
                assert await there.original(sent.json()) == image
        said = tls.said(" GET 200 ", 2)
    assert said.count(" POST 201 ") == 2
    assert patient not in said
    assert "patient_id" not in said


async def test_the_nodes_log_is_verified_without_asking_its_database(node, pms) -> None:
    """A superuser of the database edits an event, and has the database say the digests of before."""
    state = PostgresState.read(node.home / "postgres.json")
    password = f"//derm_superuser:{state.superuser_password}@"
    administrator = await asyncpg.connect(re.sub(r"//.*?@", password, node.urls.owner))
    command = ("-m", "cluster.cli", "audit")
    actor = await pms.owner.fetchval("SELECT actor FROM audit_events WHERE event_id = 1")
    await asyncio.to_thread(node.run, *command, "checkpoint")
    try:
        await administrator.execute("SET session_replication_role = replica")
        await administrator.execute(ASK_THE_SUSPECT.replace("event_id = 5", "event_id = 1"))
        with pytest.raises(AssertionError, match="the event or its place has changed: seal 1, event 1"):
            await asyncio.to_thread(node.run, *command, "verify")
    finally:
        await administrator.execute("UPDATE audit_events SET actor = $1 WHERE event_id = 1", actor)
        await administrator.execute("DROP FUNCTION audit_digest; DROP TABLE aside")
        await administrator.close()
    assert "nothing found" in await asyncio.to_thread(node.run, *command, "verify")
