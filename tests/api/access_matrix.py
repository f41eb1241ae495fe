"""The access matrix: roles × routes × circumstances, and how a route is asked about one patient's record."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any
from uuid import uuid4

import httpx

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
ROLES = ("clinician", "supervisor", "auditor", "operator", "pms_service", "porter")

#: Which roles get past the door for an action; written out, not derived.
GRANTED = {
    "upload": {"clinician", "pms_service"},
    "list": {"clinician", "supervisor", "pms_service"},
    "read": {"clinician", "supervisor", "pms_service"},
    "download": {"clinician", "supervisor"},
    "replay": {"clinician", "supervisor", "pms_service"},
    "confirm": {"clinician"},
    "erase": {"supervisor", "pms_service"},
    "read_receipt": {"clinician", "supervisor", "auditor", "pms_service"},
    "view_reference": set(ROLES) - {"porter"},
    "break_glass": {"clinician", "supervisor"},
    "review_access": {"supervisor", "auditor"},
}
#: Needs no patient in care: (role or all, action).
ANY_PATIENT = {("supervisor", "erase"), ("supervisor", "read_receipt"), ("auditor", "read_receipt")}
PATIENTLESS = {"view_reference", "break_glass", "review_access"}
BY_EMERGENCY = {
    (role, action)
    for role, action in product(
        ("clinician", "supervisor"),
        ("upload", "list", "read", "download", "replay", "confirm", "read_receipt"),
    )
    if role in GRANTED[action] and (role, action) not in ANY_PATIENT
}

#: Of care: whether it counts.
CARE = {
    "assigned": True,
    "not assigned": False,
    "ended": False,
    "not yet started": False,
    "other patient": False,
}
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
