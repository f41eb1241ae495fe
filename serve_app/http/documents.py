"""What the OpenAPI document says of every route: problems, the upload's body, and the names of its shapes."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import Field

from serve_app.domain.assessment import one_of
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.patient import AnatomSite, BodyView, Sex, SkinType
from serve_app.domain.review import Referral
from serve_app.keys.receipts import ErasureReason
from serve_app.records.answers import Document

_REFERENCE = re.compile(r"#/components/schemas/(\w+)")


def name_documents(api: dict[str, Any]) -> dict[str, Any]:
    """Publish the domain's shapes under the names that clients know, `Risk` as `RiskDocument`, and what is referred to."""
    text, shapes = json.dumps(api), api["components"]["schemas"]
    names = {
        name: f"{name.removesuffix('Document')}Document" if shapes[name]["type"] == "object" else name
        for name in sorted(set(_REFERENCE.findall(text)))
    }
    document: dict[str, Any] = json.loads(
        _REFERENCE.sub(lambda found: f"#/components/schemas/{names[found[1]]}", text)
    )
    shapes = document["components"]["schemas"]
    document["components"]["schemas"] = {
        known: shapes[name] | {"title": known} for name, known in names.items()
    }
    return document


class ProblemDocument(Document):
    """RFC 9457; `code` is stable, `detail` is for people."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str


class ErasureDocument(Document):
    """A receipt of erasure; while the key is not yet known to be gone, `erased_at` and `record_hash` are null.

    `record_hash` is the SHA-256 of the other fields (docs/erasure.md); the audit log holds it, too.
    """

    receipt_id: str
    image_id: str
    erased_at: str | None
    actor: str
    reason: Annotated[ErasureReason, one_of(ErasureReason, "Reason")]
    ciphertext_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    data_key_id: str
    record_hash: str | None = Field(pattern="^[0-9a-f]{64}$")


#: For what is of a patient, or of who did what: nothing between here and the caller keeps it.
NO_STORE = {"Cache-Control": "no-store"}

PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "content": {"application/problem+json": {}}}
    for status in (401, 403, 404, 408, 409, 410, 413, 415, 422, 429, 431, 503)
}

UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image", "patient_id"],
                "additionalProperties": False,
                "properties": {
                    "image": {"type": "string", "format": "binary", "description": "JPEG or PNG"},
                    "patient_id": {"type": "string", "description": "opaque id of the PMS"},
                    "encounter_id": {"type": "string"},
                    "lesion_id": {"type": "string", "format": "uuid", "description": "for a follow-up"},
                    "anatom_site_general": {"type": "string", "enum": list(AnatomSite)},
                    "age_approx": {"type": "integer", "minimum": 0, "maximum": 120},
                    "sex": {"type": "string", "enum": list(Sex)},
                    "history": {"type": "string", "description": "JSON object of yes/no answers"},
                    "checklist": {"type": "string", "description": "JSON object: weighted 7-point checklist"},
                    "skin_type": {
                        "type": "string",
                        "enum": list(SkinType),
                        "description": "Fitzpatrick; for reports, changes no answer",
                    },
                    "device": {
                        "type": "string",
                        "maxLength": 64,
                        "pattern": "^[!-~]([ -~]*[!-~])?$",
                        "description": "maker and model of the dermatoscope; for reports, changes no answer",
                    },
                    "view": {
                        "type": "string",
                        "enum": list(BodyView),
                        "description": "of the upright body, with x and y; changes no answer",
                    },
                    **{
                        name: {
                            "type": "number",
                            "minimum": 0,
                            "maximum": 1,
                            "description": f"where in the view, of its frame, {along}; four decimals at the most",
                        }
                        for name, along in {
                            "x": "from the left edge to the right as it is looked at",
                            "y": "from the crown to the soles",
                        }.items()
                    },
                    "impression": {
                        "type": "string",
                        "description": "JSON object, from a clinician alone and before the answer: their own"
                        f" diagnosis ({', '.join(Diagnosis)}) and intended_referral ({', '.join(Referral)});"
                        " changes no answer",
                    },
                },
            }
        }
    },
}
