"""Who may: tokens, care assignments, and that a stranger learns nothing."""

from __future__ import annotations

import time
from uuid import uuid4

from joserfc import jwt
from joserfc.jwk import OctKey
import pytest

SECRET = "a secret of the tests, long enough for HS256"


def signed(*, secret: str = SECRET, algorithm: str = "HS256", **changed: object) -> str:
    now = int(time.time())
    claims = {"iss": "derm-cds", "aud": "derm-cds", "sub": "dr", "roles": ["clinician"], "exp": now + 600}
    claims |= changed
    registry = {"algorithms": [algorithm]}
    return jwt.encode({"alg": algorithm}, claims, OctKey.import_key(secret), **registry)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer not.a.token",
        "Basic ZHI6ZHI=",
        "Bearer " + "a" * 9000,
        signed(),
        "Bearer " + signed(exp=int(time.time()) - 60),
        "Bearer " + signed(aud="another service"),
        "Bearer " + signed(iss="another issuer"),
        "Bearer " + signed(nbf=int(time.time()) + 600),
        "Bearer " + signed(secret="another secret, just as long as it must be"),
        "Bearer " + signed(algorithm="HS512"),
        "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJkciJ9.",
    ],
    ids=[
        *("none", "empty", "bare", "blank", "garbage", "basic", "huge", "no scheme", "expired"),
        *("audience", "issuer", "not yet", "forged", "algorithm", "unsigned"),
    ],
)
async def test_without_a_valid_token_there_is_no_answer(service, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    before = await service.counts()
    posted = await service.client.post(
        "/api/lesions", files={"image": service.image}, data={"patient_id": "p"}, headers=headers
    )
    read = await service.client.get(f"/api/lesions/{uuid4()}", headers=headers)
    for response in (posted, read):
        service.hold_to_problem(response, 401, "unauthenticated")
        assert response.headers["www-authenticate"] == "Bearer"
        (event,) = await service.events(response)
        assert (event["action"], event["actor"], event["outcome"]) == (
            *("authenticate", "unauthenticated", "denied"),
        )
        assert event["detail"] == {"code": "unauthenticated", "client": "127.0.0.1"}
    assert await service.counts() == {**before, "audit_events": before["audit_events"] + 2}


async def test_anothers_patient_and_no_patient_look_alike(service) -> None:
    foreign = await service.care("dr-other")
    responses = [await service.upload(patient) for patient in (foreign, "nobody-at-all")]
    bodies = [service.hold_to_problem(response, 403, "forbidden") for response in responses]
    for body in bodies:
        del body["request_id"]
    assert bodies[0] == bodies[1]
    sizes = {response.headers["content-length"] for response in responses}
    assert len(sizes) == 1


async def test_a_denial_is_on_record_and_nothing_else_is(service) -> None:
    foreign = await service.care("dr-other")
    before = await service.counts()
    response = await service.upload(foreign)
    after = await service.counts()
    assert after == {**before, "audit_events": before["audit_events"] + 1}
    (event,) = await service.events(response)
    assert (event["action"], event["actor"], event["outcome"]) == ("upload", "dr", "denied")
    assert event["patient_id"] == foreign
    assert event["detail"] == {"reason": "assignment"}


async def test_a_stranger_is_not_told_which_field_is_wrong(service) -> None:
    foreign = await service.care("dr-other")
    response = await service.upload(foreign, image=b"not an image", age_approx="-1", history="{")
    service.hold_to_problem(response, 403, "forbidden")


async def test_an_ended_assignment_is_none(service) -> None:
    patient = await service.care()
    await service.owner.execute(
        "UPDATE care_assignments SET ends_at = now() - interval '1 second' WHERE patient_id = $1", patient
    )
    service.hold_to_problem(await service.upload(patient), 403, "forbidden")


async def test_a_role_that_is_not_known_grants_nothing(service) -> None:
    patient = await service.care("porter")
    headers = service.token("porter", ("porter",))
    response = await service.upload(patient, subject="porter", headers=headers)
    service.hold_to_problem(response, 403, "forbidden")
    (event,) = await service.events(response)
    assert event["detail"] == {"reason": "role"}


async def test_another_patients_lesion_is_not_found(service) -> None:
    mine, other = await service.care(), await service.care()
    lesion = (await service.upload(other)).json()["lesion_id"]
    before = await service.counts()
    responses = [await service.upload(mine, lesion_id=sent) for sent in (lesion, str(uuid4()))]
    bodies = [service.hold_to_problem(response, 404, "not_found") for response in responses]
    assert bodies[0]["detail"] == bodies[1]["detail"]
    after = await service.counts()
    assert after == {**before, "audit_events": before["audit_events"] + 2}
    for response in responses:
        (event,) = await service.events(response)
        assert (event["action"], event["outcome"]) == ("upload", "failed")
        assert event["patient_id"] == mine
        assert event["detail"] == {"code": "not_found"}


async def test_reading_needs_the_assignment_too(service) -> None:
    patient = await service.care("dr-other")
    headers = service.token("dr-other")
    answer = (await service.upload(patient, subject="dr-other")).json()
    lesion, image = answer["lesion_id"], answer["image_id"]
    ways = {
        f"/api/lesions/{lesion}": "read",
        f"/api/lesions/{lesion}/images/{image}": "download",
        f"/api/lesions?patient_id={patient}": "list",
    }
    unknown = {
        f"/api/lesions/{uuid4()}": "read",
        f"/api/lesions/{uuid4()}/images/{uuid4()}": "download",
        "/api/lesions?patient_id=nobody": "list",
    }
    for way in ways:
        assert (await service.client.get(way, headers=headers)).status_code == 200
    details = set()
    for way, action in [*ways.items(), *unknown.items()]:
        response = await service.client.get(way, headers=service.token("dr"))
        details.add(service.hold_to_problem(response, 403, "forbidden")["detail"])
        (event,) = await service.events(response)
        assert (event["action"], event["outcome"], event["actor"]) == (action, "denied", "dr")
    assert len(details) == 1


async def test_the_pms_reads_answers_but_not_originals(service) -> None:
    patient = await service.care("pms")
    headers = service.token("pms", ("pms_service",))
    answer = (await service.upload(patient, subject="pms", headers=headers)).json()
    lesion = f"/api/lesions/{answer['lesion_id']}"
    assert (await service.client.get(lesion, headers=headers)).status_code == 200
    response = await service.client.get(f"{lesion}/images/{answer['image_id']}", headers=headers)
    service.hold_to_problem(response, 403, "forbidden")
