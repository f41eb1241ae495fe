"""Each route of the interface asks the one decision: let in and denied once each, with exactly one audit event.

What is decided, for all roles, actions and circumstances, is tests/serve_app/access/test_access.py's. The routes come from
the OpenAPI document: one that is new and has no row here fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
import httpx
import pytest

from serve_app.access.rules import Action, Role
from serve_app.access.tokens import mint_token
from serve_app.audit.events import AuditEvent
from serve_app.http.caller import Caller
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore

ANONYMOUS = {"/healthz", "/readyz"}

#: Method and path, `{patient}` where the patient is in the query or the form: the action that it is.
ROUTES: dict[tuple[str, str], str] = {
    ("POST", "/api/lesions"): "upload",
    ("GET", "/api/lesions"): "list",
    ("GET", "/api/lesions/{lesion_id}"): "read",
    ("GET", "/api/lesions/{lesion_id}/images/{image_id}"): "download",
    ("GET", "/api/lesions/{lesion_id}/images/{image_id}/similar"): "read",
    ("DELETE", "/api/lesions/{lesion_id}/images/{image_id}"): "erase",
    ("GET", "/api/lesions/{lesion_id}/images/{image_id}/receipt"): "read_receipt",
    ("POST", "/api/lesions/{lesion_id}/assessments/{assessment_id}/replay"): "replay",
    ("POST", "/api/lesions/{lesion_id}/confirm"): "confirm",
    ("GET", "/api/references/{isic_id}/image"): "view_reference",
    ("POST", "/api/emergency-access"): "break_glass",
    ("GET", "/api/emergency-access"): "review_access",
    ("POST", "/api/emergency-access/{emergency_id}/review"): "review_access",
}
#: Who is let in by a care assignment; and who is denied, of the same action, and why.
LET_IN = {"erase": "supervisor", "review_access": "supervisor"}
DENIED = {
    "erase": ("pms_service", "assignment"),
    "view_reference": ("porter", "role"),
    "break_glass": ("auditor", "role"),
    "review_access": ("clinician", "role"),
}
READ = ("GET", "/api/lesions/{lesion_id}")
BAD_TOKENS = ("expired", "wrong audience", "wrong issuer", "alg none", "forged", "no token")


@dataclass(frozen=True)
class Record:
    """One patient's lesion, with an image for each that may be erased."""

    patient: str
    lesion: str
    image: str
    assessment: str


async def ask(
    service,
    method: str,
    path: str,
    record: Record,
    headers: dict[str, str],
    *,
    emergency_id: str | None = None,
) -> httpx.Response:
    """Ask a route about the record, with a body that is all right but for erasures, which must not happen."""
    url = path.format(
        lesion_id=record.lesion,
        # Nothing is erased here: an image that is not there says as well whether one may.
        image_id=uuid4() if method == "DELETE" or path.endswith("receipt") else record.image,
        assessment_id=record.assessment,
        isic_id="ISIC_0000000",
        emergency_id=emergency_id or uuid4(),
    )
    if (method, path) == ("POST", "/api/lesions"):
        return await service.client.post(
            url, data={"patient_id": record.patient}, files={"image": b"no image"}, headers=headers
        )
    bodies: dict[tuple[str, str], Any] = {
        ("DELETE", "/api/lesions/{lesion_id}/images/{image_id}"): {"reason": "patient_request"},
        ("POST", "/api/lesions/{lesion_id}/confirm"): {"image_id": record.image},
        ("POST", "/api/emergency-access"): {
            "patient_id": record.patient,
            "reason": "unconscious in casualty",
        },
        ("POST", "/api/emergency-access/{emergency_id}/review"): {"outcome": "justified"},
    }
    params = {"patient_id": record.patient} if (method, path) == ("GET", "/api/lesions") else None
    return await service.client.request(
        method, url, params=params, json=bodies.get((method, path)), headers=headers
    )


async def one_event(service, response: httpx.Response, action: str) -> Any:
    """The request's only event; an upload that was let in may have its classification's beside it."""
    (event,) = [event for event in await service.events(response) if event["action"] != "classify"]
    assert event["action"] == action
    return event


@pytest.fixture(scope="module")
async def record(service) -> Record:
    patient = await service.care("dr-matrix-owner")
    answer = (await service.upload(patient, subject="dr-matrix-owner")).json()
    return Record(patient, answer["lesion_id"], answer["image_id"], answer["assessment_id"])


def test_every_route_of_the_document_has_its_row(service) -> None:
    found = {
        (method.upper(), path): operation.get("x-action")
        for path, operations in service.document["paths"].items()
        for method, operation in operations.items()
        if path not in ANONYMOUS
    }
    assert found == ROUTES
    assert set(found.values()) <= set(Action)


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_who_may_is_let_in(service, record: Record, method: str, path: str) -> None:
    action = ROUTES[method, path]
    role, subject = LET_IN.get(action, "clinician"), f"dr-{uuid4().hex[:8]}"
    await service.care(subject, record.patient)
    response = await ask(service, method, path, record, service.token(subject, (role,)))
    assert response.status_code != 403, response.text
    if response.status_code < 300 and action == "view_reference":
        assert await service.events(response) == []
        return
    event = await one_event(service, response, action)
    assert event["outcome"] == ("success" if response.status_code < 300 else "failed")
    assert event["actor"] == subject


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_who_may_not_is_denied(service, record: Record, method: str, path: str) -> None:
    action = ROUTES[method, path]
    role, reason = DENIED.get(action, ("clinician", "assignment"))
    headers = service.token(f"dr-{uuid4().hex[:8]}", (role,))
    response = await ask(service, method, path, record, headers)
    service.hold_to_problem(response, 403, "forbidden")
    event = await one_event(service, response, action)
    assert (event["outcome"], event["detail"]) == ("denied", {"reason": reason})


@pytest.mark.parametrize(
    ("starts", "ends", "patient"),
    [(-2, -1, None), (1, None, None), (-1, None, "somebody-else")],
    ids=["ended", "not yet started", "other patient"],
)
async def test_care_is_for_its_time_and_its_patient(
    service, record: Record, starts: int, ends: int | None, patient: str | None
) -> None:
    now, subject = datetime.now(UTC), f"dr-{uuid4().hex[:8]}"
    await LesionStore(service.owner).assign(
        patient or record.patient,
        subject,
        starts_at=now + timedelta(hours=starts),
        ends_at=None if ends is None else now + timedelta(hours=ends),
    )
    response = await ask(service, *READ, record, service.token(subject))
    service.hold_to_problem(response, 403, "forbidden")


@pytest.mark.parametrize("bad", BAD_TOKENS)
async def test_no_token_that_holds(service, record: Record, bad: str) -> None:
    response = await ask(service, *READ, record, bad_headers(bad))
    service.hold_to_problem(response, 401, "unauthenticated")
    event = await one_event(service, response, "authenticate")
    assert (event["actor"], event["outcome"]) == ("unauthenticated", "denied")
    assert event["patient_id"] is None


def bad_headers(bad: str) -> dict[str, str]:
    values: dict[str, Any] = {
        "secret": "a secret of the tests, long enough for HS256",
        "issuer": "derm-cds",
        "audience": "derm-cds",
        "subject": "dr-matrix-owner",
        "roles": ("clinician", "supervisor"),
    }
    if bad == "no token":
        return {}
    if bad == "alg none":
        return {"Authorization": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJkciJ9."}
    changed = {
        "expired": {"lifetime_s": -60},
        "wrong audience": {"audience": "another"},
        "wrong issuer": {"issuer": "another"},
        "forged": {"secret": "another secret, which is as long as it must be"},
    }[bad]
    return {"Authorization": f"Bearer {mint_token(**{**values, **changed})}"}


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


@pytest.mark.parametrize(
    ("role", "method", "path"),
    [
        *(("clinician", *route) for route, action in ROUTES.items() if action in {"list", "read", "replay"}),
        ("supervisor", "DELETE", "/api/lesions/{lesion_id}/images/{image_id}"),
    ],
)
async def test_what_rests_on_an_emergency_is_put_down_to_it(
    service, record: Record, role: str, method: str, path: str
) -> None:
    headers = service.token(f"dr-{uuid4().hex[:8]}", (role,))
    opened = await ask(service, "POST", "/api/emergency-access", record, headers)
    assert opened.status_code == 201
    response = await ask(service, method, path, record, headers)
    assert response.status_code != 403, response.text
    event = await one_event(service, response, ROUTES[method, path])
    if role == "clinician":
        assert event["detail"]["emergency_access"] == opened.json()["emergency_id"]
    else:  # a supervisor needs none for it
        assert "emergency_access" not in event["detail"]


async def test_an_expired_emergency_is_none(service, record: Record) -> None:
    subject = f"dr-{uuid4().hex[:8]}"
    await service.owner.execute(
        "INSERT INTO emergency_accesses (emergency_id, patient_id, principal, reason, starts_at, ends_at)"
        " VALUES ($1, $2, $3, 'unconscious in casualty', now() - interval '5 hours', now() - interval '1 hour')",
        uuid4(),
        record.patient,
        subject,
    )
    response = await service.client.get(f"/api/lesions/{record.lesion}", headers=service.token(subject))
    service.hold_to_problem(response, 403, "forbidden")


async def test_an_emergency_is_for_one_patient_and_one_principal(service, record: Record) -> None:
    mine, other = f"dr-{uuid4().hex[:8]}", f"dr-{uuid4().hex[:8]}"
    for subject, patient in ((mine, "somebody-else"), (other, record.patient)):
        opened = await service.client.post(
            "/api/emergency-access",
            json={"patient_id": patient, "reason": "unconscious in casualty"},
            headers=service.token(subject),
        )
        assert opened.status_code == 201
    response = await service.client.get(f"/api/lesions/{record.lesion}", headers=service.token(mine))
    service.hold_to_problem(response, 403, "forbidden")


NOWHERE = "00000000-0000-7000-8000-000000000000"
BAD_QUERIES = (
    ("GET", "/api/lesions", "list"),
    ("GET", "/api/lesions?patient_id=p&limit=0", "list"),
    ("GET", "/api/lesions?patient_id=p&limit=many", "list"),
    ("GET", "/api/lesions?patient_id=a%20b", "list"),
    ("GET", "/api/lesions?patient_id=p&cursor=x", "list"),
    ("GET", "/api/lesions/7", "read"),
    ("GET", "/api/lesions/7/images/8", "download"),
    ("GET", f"/api/lesions/{NOWHERE}/images/{NOWHERE}/similar?diagnosis=UNK", "read"),
    ("GET", f"/api/lesions/{NOWHERE}/images/{NOWHERE}/similar?anatom_site_general=moon", "read"),
    ("GET", f"/api/lesions/{NOWHERE}/images/8/similar", "read"),
    ("POST", "/api/lesions?top_k=51", "upload"),
    ("POST", "/api/lesions?licence=GPL", "upload"),
    ("POST", "/api/lesions/7/assessments/8/replay", "replay"),
    ("POST", "/api/emergency-access", "break_glass"),
)


@pytest.mark.parametrize(("method", "url", "action"), BAD_QUERIES)
async def test_a_bad_parameter_is_one_event(service, method: str, url: str, action: str) -> None:
    response = await service.client.request(method, url, headers=service.token("dr"))
    service.hold_to_problem(response, 422, "invalid_field")
    event = await one_event(service, response, action)
    assert (event["actor"], event["outcome"]) == ("dr", "failed")
    assert event["detail"] == {"code": "invalid_field"}


async def test_a_route_without_a_rule_is_denied_to_all(service, start_service, local_stages) -> None:
    router = APIRouter()

    @router.get("/api/new")
    async def new(_: Caller) -> str:
        return "in"

    async with start_service(local_stages()) as fresh:
        fresh.app.include_router(router)
        response = await fresh.client.get("/api/new", headers=fresh.token("dr", tuple(Role)))
        fresh.hold_to_problem(response, 403, "forbidden")
        event = await one_event(fresh, response, "undeclared")
    assert event["detail"] == {"reason": "no_rule"}


async def test_the_check_for_revocation_is_a_matter_of_an_index(service) -> None:
    await service.owner.execute(
        "INSERT INTO revocations (kind, value, revoked_by)"
        " SELECT 'token', 'gone-' || n, 'operator' FROM generate_series(1, 20000) AS n"
    )
    plan = await service.owner.fetch(
        "EXPLAIN SELECT FROM revocations WHERE (kind = 'subject' AND value = 'dr') OR (kind = 'token' AND value = 'x')"
    )
    assert not any("Seq Scan" in line[0] for line in plan)
