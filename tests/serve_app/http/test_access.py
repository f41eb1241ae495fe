"""Who may: each route asks the one decision, with one audit event; tokens, care, emergencies, what a stranger learns.

What is decided, for all roles, actions and circumstances, is tests/serve_app/access/test_access.py's. The routes come from
the OpenAPI document: one that is new and has no row here fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
import httpx
from joserfc import jwt
from joserfc.jwk import OctKey
import pytest

from serve_app.access.rules import Role
from serve_app.audit.events import AuditEvent
from serve_app.http.access import Caller
from serve_app.records.access import AccessStore
from tests.serve_app.conftest import SECRET

ANONYMOUS = {"/healthz", "/readyz", "/cds-services"}
#: For EHRs, with tokens of another kind and a description of their own: tests/serve_app/hooks has who may.
OF_EHRS = {("POST", "/cds-services/{service_id}"), ("POST", "/cds-services/{service_id}/feedback")}

#: Method and path, `{patient}` where the patient is in the query or the form: the action that it is.
ROUTES: dict[tuple[str, str], str] = {
    ("POST", "/api/lesions"): "upload",
    ("GET", "/api/lesions"): "list",
    ("GET", "/api/lesions/{lesion_id}"): "read",
    ("GET", "/api/lesions/{lesion_id}/report"): "read_report",
    ("GET", "/api/lesions/{lesion_id}/images/{image_id}"): "download",
    ("GET", "/api/lesions/{lesion_id}/images/{image_id}/similar"): "read",
    ("DELETE", "/api/lesions/{lesion_id}/images/{image_id}"): "erase",
    ("GET", "/api/lesions/{lesion_id}/images/{image_id}/receipt"): "read_receipt",
    ("POST", "/api/lesions/{lesion_id}/assessments/{assessment_id}/replay"): "replay",
    ("POST", "/api/lesions/{lesion_id}/confirm"): "confirm",
    ("GET", "/api/worklist"): "view_worklist",
    ("POST", "/api/lesions/{lesion_id}/reviews"): "review",
    ("POST", "/api/lesions/{lesion_id}/outcomes"): "record_outcome",
    ("POST", "/api/lesions/{lesion_id}/link"): "link",
    ("POST", "/api/lesions/{lesion_id}/unlink"): "unlink",
    ("GET", "/api/references/{isic_id}/image"): "view_reference",
    ("GET", "/api/reports/summary"): "view_statistics",
    ("GET", "/api/reports/performance"): "view_statistics",
    ("GET", "/api/reports/drift"): "view_statistics",
    ("POST", "/api/emergency-access"): "break_glass",
    ("GET", "/api/emergency-access"): "review_access",
    ("POST", "/api/emergency-access/{emergency_id}/review"): "review_access",
}
#: Who is let in by a care assignment; and who is denied, of the same action, and why.
LET_IN = {"erase": "supervisor", "review_access": "supervisor", "view_statistics": "operator"}
DENIED = {
    "erase": ("pms_service", "assignment"),
    "view_worklist": ("auditor", "role"),
    "view_reference": ("porter", "role"),
    "view_statistics": ("clinician", "role"),
    "break_glass": ("auditor", "role"),
    "review_access": ("clinician", "role"),
}
READ = ("GET", "/api/lesions/{lesion_id}")


@dataclass(frozen=True)
class Record:
    """One patient's lesion, with an image for each that may be erased, and an earlier one."""

    patient: str
    earlier: str
    lesion: str
    image: str
    assessment: str


async def ask(service, method: str, path: str, record: Record, headers: dict[str, str]) -> httpx.Response:
    """Ask a route about the record, with a body that is all right but for erasures, which must not happen."""
    url = path.format(
        lesion_id=record.lesion,
        # Nothing is erased here: an image that is not there says as well whether one may.
        image_id=uuid4() if method == "DELETE" or path.endswith("receipt") else record.image,
        assessment_id=record.assessment,
        isic_id="ISIC_0000000",
        emergency_id=uuid4(),
    )
    if (method, path) == ("POST", "/api/lesions"):
        form = {"data": {"patient_id": record.patient}, "files": {"image": b"no image"}}
        return await service.client.post(url, headers=headers, **form)
    bodies: dict[str, Any] = {
        "erase": {"reason": "patient_request"},
        "confirm": {"image_id": record.image},
        "review": {"assessment_id": record.assessment, "decision": "accept"},
        "record_outcome": {
            "kind": "follow_up",
            "malignant": False,
            "observed_on": "2026-06-01",
            "source": "clinician",
        },
        "link": {"earlier_lesion_id": record.earlier, "reason": "other"},
        "unlink": {"reason": "other"},
        "break_glass": {"patient_id": record.patient, "reason": "unconscious in casualty"},
        "review_access": {"outcome": "justified"},
    }
    action = ROUTES[method, path]
    params = {"patient_id": record.patient} if action == "list" else None
    body = bodies.get(action) if method != "GET" else None
    return await service.client.request(method, url, params=params, json=body, headers=headers)


async def one_event(service, response: httpx.Response, action: str) -> Any:
    """The request's only event; an upload that was let in may have its classification's beside it."""
    (event,) = [event for event in await service.events(response) if event["action"] != "classify"]
    assert event["action"] == action
    return event


@pytest.fixture(scope="module")
async def record(service) -> Record:
    patient = await service.care("dr-matrix-owner")
    earlier, answer = [(await service.upload(patient, subject="dr-matrix-owner")).json() for _ in range(2)]
    return Record(
        patient, earlier["lesion_id"], answer["lesion_id"], answer["image_id"], answer["assessment_id"]
    )


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_who_may_is_let_in_and_who_may_not_is_denied(service, record, method: str, path: str) -> None:
    action, subject = ROUTES[method, path], f"dr-{uuid4().hex[:8]}"
    await service.care(subject, record.patient)
    headers = service.token(subject, (LET_IN.get(action, "clinician"),))
    response = await ask(service, method, path, record, headers)
    assert response.status_code != 403, response.text
    if response.status_code < 300 and action == "view_reference":
        assert await service.events(response) == []
    else:
        event = await one_event(service, response, action)
        assert event["outcome"] == ("success" if response.status_code < 300 else "failed")
        assert event["actor"] == subject

    role, reason = DENIED.get(action, ("clinician", "assignment"))
    headers = service.token(f"dr-{uuid4().hex[:8]}", (role,))
    response = await ask(service, method, path, record, headers)
    service.hold_to_problem(response, 403, "forbidden")
    event = await one_event(service, response, action)
    assert (event["outcome"], event["detail"]) == ("denied", {"reason": reason})


async def test_care_is_for_its_time_and_its_patient(service, record: Record) -> None:
    """Ended, not yet started, another patient's."""
    now, subject = datetime.now(UTC), f"dr-{uuid4().hex[:8]}"
    for starts, ends, patient in ((-2, -1, record.patient), (1, None, record.patient), (-1, None, "another")):
        until = None if ends is None else now + timedelta(hours=ends)
        since = now + timedelta(hours=starts)
        care = "INSERT INTO care_assignments VALUES ($1, $2, $3, $4)"
        await service.owner.execute(care, patient, subject, since, until)
    response = await ask(service, *READ, record, service.token(subject))
    service.hold_to_problem(response, 403, "forbidden")


TEN_YEARS = 315_360_000


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        *(
            ({"sub": name}, "subject")
            for name in ("os:root", "\uff2fs:root", "derm-cds:outbox", "retention", " dr", "", "x" * 256)
        ),
        *(({"exp": TEN_YEARS, "iat": iat}, "lifetime") for iat in (0, None)),
    ],
)
async def test_what_the_issuer_should_not_have_signed_is_refused_and_said(
    service, record, changed, code
) -> None:
    """A name of our own in the audit log, another's with a space before it, and a token that is good for ten years."""
    now = int(time.time())
    claims = {
        "iss": "derm-cds",
        "aud": "derm-cds",
        "sub": "dr-matrix-owner",
        "roles": ["clinician"],
        "iat": 0,
        "exp": 600,
    }
    claims = {
        name: now + each if name in {"iat", "exp"} and each is not None else each
        for name, each in (claims | changed).items()
    }
    if claims["sub"]:
        await service.care(claims["sub"], record.patient)
    signed = jwt.encode(
        {"alg": "HS256"}, {k: v for k, v in claims.items() if v is not None}, OctKey.import_key(SECRET)
    )
    answer = await ask(service, *READ, record, {"Authorization": f"Bearer {signed}"})
    service.hold_to_problem(answer, 401, f"token_{code}_refused")
    assert answer.headers["www-authenticate"] == "Bearer"
    event = await service.hold_to_event(answer, "authenticate", "denied")
    assert (event["actor"], event["detail"]["code"]) == ("unauthenticated", f"token_{code}_refused")


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer not.a.token", "Basic ZHI6ZHI=", "Bearer " + "a" * 9000],
    ids=["none", "empty", "bare", "blank", "garbage", "basic", "huge"],
)
async def test_without_a_valid_token_there_is_no_answer(service, authorization: str | None) -> None:
    """Which tokens are valid is tests/serve_app/access/test_tokens.py's."""
    headers = {} if authorization is None else {"Authorization": authorization}
    async with service.storing_nothing():
        response = await service.client.post("/api/lesions", files={"image": service.image}, headers=headers)
    service.hold_to_problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"
    event = await one_event(service, response, "authenticate")
    assert (event["actor"], event["outcome"]) == ("unauthenticated", "denied")
    assert event["detail"] == {"code": "unauthenticated", "client": "127.0.0.1"}


async def test_anothers_patient_and_no_patient_look_alike(service) -> None:
    """Whatever else is wrong with what was sent; the denial is on record, and nothing else is."""
    foreign = await service.care("dr-other")
    wrong = {"image": b"not an image", "age_approx": "-1", "history": "{"}
    async with service.storing_nothing(events=2):
        responses = [await service.upload(patient, **wrong) for patient in (foreign, "nobody-at-all")]
    bodies = [service.hold_to_problem(response, 403, "forbidden") for response in responses]
    assert len({body.pop("request_id") for body in bodies}) == 2
    assert bodies[0] == bodies[1]
    assert len({response.headers["content-length"] for response in responses}) == 1
    event = await one_event(service, responses[0], "upload")
    assert (event["actor"], event["outcome"], event["patient_id"]) == ("dr", "denied", foreign)
    assert event["detail"] == {"reason": "assignment"}


async def test_an_unknown_lesion_looks_like_a_strangers(service, record: Record) -> None:
    details = set()
    for lesion, image in ((record.lesion, record.image), (uuid4(), uuid4())):
        for url, action in (
            (f"/api/lesions/{lesion}", "read"),
            (f"/api/lesions/{lesion}/images/{image}", "download"),
        ):
            response = await service.client.get(url, headers=service.token("stranger"))
            details.add(service.hold_to_problem(response, 403, "forbidden")["detail"])
            assert (await one_event(service, response, action))["outcome"] == "denied"
    assert len(details) == 1


async def test_another_patients_lesion_is_not_found(service, answer) -> None:
    mine = await service.care()
    async with service.storing_nothing(events=2):
        asked = (answer["lesion_id"], str(uuid4()))
        responses = [await service.upload(mine, lesion_id=lesion) for lesion in asked]
    bodies = [await service.hold_to_failure(response, 404, "not_found", "upload") for response in responses]
    assert bodies[0]["detail"] == bodies[1]["detail"]
    for response in responses:
        assert (await one_event(service, response, "upload"))["patient_id"] == mine


def operators(action: str) -> AuditEvent:
    return AuditEvent(action=action, actor="operator", outcome="success", request_id=str(uuid4()))


@pytest.mark.parametrize("kind", ["subject", "token"])
async def test_revoked_from_the_next_request_on(service, record: Record, kind: str) -> None:
    subject, token_id = f"dr-{uuid4().hex[:8]}", str(uuid4())
    await service.care(subject, record.patient)
    headers = service.token(subject, token_id=token_id)
    assert (await ask(service, *READ, record, headers)).status_code == 200
    store = AccessStore(service.owner)
    value = subject if kind == "subject" else token_id
    assert await store.revoke(kind, value, by="operator", event=operators("revoke"))
    response = await ask(service, *READ, record, headers)
    service.hold_to_problem(response, 401, "unauthenticated")
    event = await one_event(service, response, "read")
    assert (event["actor"], event["outcome"]) == (subject, "denied")
    assert event["detail"] == {"reason": "revoked"}
    other = await ask(service, *READ, record, service.token(subject))
    assert other.status_code == (401 if kind == "subject" else 200)
    assert await store.restore(kind, value, event=operators("restore"))
    assert (await ask(service, *READ, record, headers)).status_code == 200


async def test_an_emergency_is_for_its_time_one_patient_and_one_principal(service, record: Record) -> None:
    mine, other = f"dr-{uuid4().hex[:8]}", f"dr-{uuid4().hex[:8]}"
    for subject, patient in ((mine, "somebody-else"), (other, record.patient)):
        asked = replace(record, patient=patient)
        opened = await ask(service, "POST", "/api/emergency-access", asked, service.token(subject))
        assert opened.status_code == 201
    await service.owner.execute(
        "INSERT INTO emergency_accesses (emergency_id, patient_id, principal, reason, starts_at, ends_at)"
        " VALUES ($1, $2, $3, 'unconscious in casualty', now() - interval '5 hours', now() - interval '1 hour')",
        uuid4(),
        record.patient,
        mine,
    )
    response = await ask(service, *READ, record, service.token(mine))
    service.hold_to_problem(response, 403, "forbidden")


async def test_a_route_without_a_rule_is_denied_to_all(service, start_service) -> None:
    router = APIRouter()

    @router.get("/api/new")
    async def new(_: Caller) -> str:
        return "in"

    async with start_service() as fresh:
        fresh.app.include_router(router)
        response = await fresh.client.get("/api/new", headers=fresh.token("dr", tuple(Role)))
        fresh.hold_to_problem(response, 403, "forbidden")
        event = await one_event(fresh, response, "undeclared")
    assert event["detail"] == {"reason": "no_rule"}
