"""Roles × routes × circumstances: who is let in, who is not, and exactly one audit event for each.

The routes come from the OpenAPI document: one that is new and has no row in `access_matrix` fails.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
import pytest

from serve_app.api.authentication import Caller
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.security.access import Action
from serve_app.security.audit import AuditEvent
from serve_app.security.tokens import mint_token
from tests.api.access_matrix import (
    ANONYMOUS,
    ANY_PATIENT,
    BAD_TOKENS,
    BY_EMERGENCY,
    CARE,
    GRANTED,
    PATIENTLESS,
    ROLES,
    ROUTES,
    Record,
    ask,
    one_event,
)


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


async def set_care(service, subject: str, record: Record, care: str) -> None:
    now, hour = datetime.now(UTC), timedelta(hours=1)
    starts, ends, patient = {
        "assigned": (now - hour, now + hour, record.patient),
        "not assigned": (None, None, record.patient),
        "ended": (now - 2 * hour, now - hour, record.patient),
        "not yet started": (now + hour, None, record.patient),
        "other patient": (now - hour, None, "somebody-else"),
    }[care]
    if starts is not None:
        await LesionStore(service.owner).assign(patient, subject, starts_at=starts, ends_at=ends)


@pytest.mark.parametrize("care", CARE)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_care(service, record: Record, method: str, path: str, role: str, care: str) -> None:
    action, subject = ROUTES[method, path], f"{role}-{uuid4().hex[:8]}"
    await set_care(service, subject, record, care)
    response = await ask(service, method, path, record, service.token(subject, (role,)))
    granted = role in GRANTED[action]
    allowed = granted and (CARE[care] or action in PATIENTLESS or (role, action) in ANY_PATIENT)
    if not allowed:
        service.hold_to_problem(response, 403, "forbidden")
        event = await one_event(service, response, action)
        assert event["outcome"] == "denied"
        assert event["detail"] == {"reason": "assignment" if granted else "role"}
        return
    assert response.status_code != 403, response.text
    if response.status_code < 300 and action == "view_reference":
        assert await service.events(response) == []
        return
    event = await one_event(service, response, action)
    assert event["outcome"] == ("success" if response.status_code < 300 else "failed")
    assert event["actor"] == subject


@pytest.mark.parametrize("bad", BAD_TOKENS)
@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/api/openapi.json")])
async def test_no_token_that_holds(service, record: Record, method: str, path: str, bad: str) -> None:
    response = await ask(service, method, path, record, bad_headers(bad))
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
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_revoked_from_the_next_request_on(
    service, record: Record, method: str, path: str, kind: str
) -> None:
    action, subject, token_id = ROUTES[method, path], f"dr-{uuid4().hex[:8]}", str(uuid4())
    headers = service.token(subject, ("clinician", "supervisor"), token_id=token_id)
    before = await ask(service, method, path, record, headers)
    assert before.status_code != 401
    store = AccessStore(service.owner)
    value = subject if kind == "subject" else token_id
    assert await store.revoke(kind, value, by="operator", event=operators("revoke"))
    response = await ask(service, method, path, record, headers)
    service.hold_to_problem(response, 401, "unauthenticated")
    event = await one_event(service, response, action)
    assert (event["actor"], event["outcome"]) == (subject, "denied")
    assert event["detail"] == {"reason": "revoked"}
    other = await ask(service, method, path, record, service.token(subject, ("clinician", "supervisor")))
    assert (other.status_code == 401) is (kind == "subject")
    assert await store.restore(kind, value, event=operators("restore"))
    assert (await ask(service, method, path, record, headers)).status_code == before.status_code


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if ROUTES[route] not in PATIENTLESS])
async def test_break_glass(service, record: Record, method: str, path: str, role: str) -> None:
    action, subject = ROUTES[method, path], f"{role}-{uuid4().hex[:8]}"
    headers = service.token(subject, (role,))
    opened = await service.client.post(
        "/api/emergency-access",
        json={"patient_id": record.patient, "reason": "unconscious in casualty"},
        headers=headers,
    )
    assert opened.status_code == (201 if role in GRANTED["break_glass"] else 403)
    response = await ask(service, method, path, record, headers)
    event = await one_event(service, response, action)
    if (role, action) in BY_EMERGENCY:
        assert response.status_code != 403, response.text
        assert event["detail"]["emergency_access"] == opened.json()["emergency_id"]
    elif (role, action) in ANY_PATIENT:
        assert response.status_code != 403
        assert "emergency_access" not in event["detail"]
    else:
        service.hold_to_problem(response, 403, "forbidden")
        assert event["outcome"] == "denied"
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
        response = await fresh.client.get("/api/new", headers=fresh.token("dr", ROLES))
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
