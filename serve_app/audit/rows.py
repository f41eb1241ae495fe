"""What an event holds of the rows that it records: the SHA-256 of each, so that a row changed beside the log shows.

The digests stand in the event's detail, `{"rows": {table: {row: digest}}}`, null where the event ends the row; the
chain over the events keeps them. A row is as the newest event that names it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from hashlib import sha256
import json
from typing import Any
from uuid import UUID

from serve_app.audit.events import AuditEvent

#: The key of an event's detail that holds the digests; events from before there were any have none.
ROWS = "rows"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AuditedTable:
    """A table whose rows have digests: by which columns a row is named, and which others its digest is over.

    A column that is null is left out: one that a later version adds changes no older digest. Where a row could be
    guessed from its digest, and its content is in no event on purpose, a random `salt` of the row is among its columns.
    """

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]

    def name_of(self, row: Row) -> str:
        """Name a row, as its events do."""
        values = [row[column] for column in self.key]
        return str(_plain(values[0])) if len(values) == 1 else json.dumps(values, default=_plain)

    def key_of(self, name: str) -> tuple[str, ...]:
        """The values of a name."""
        return (name,) if len(self.key) == 1 else tuple(json.loads(name))

    def digest_of(self, row: Row) -> str:
        """SHA-256 of a row's columns, in hexadecimal."""
        values = {name: row[name] for name in (*self.key, *self.columns) if row[name] is not None}
        return json_digest(json.dumps([self.name, values], default=_plain, allow_nan=False))


def _table(name: str, key: str, columns: str) -> AuditedTable:
    return AuditedTable(name, tuple(key.split()), tuple(columns.split()))


CARE_ASSIGNMENTS = _table("care_assignments", "clinician patient_id starts_at", "ends_at")
REVOCATIONS = _table("revocations", "kind value", "revoked_at revoked_by")
EMERGENCY_ACCESSES = _table(
    "emergency_accesses",
    "emergency_id",
    "patient_id principal reason starts_at ends_at reviewed_at reviewer review_outcome review_note ended_at ended_by salt",
)
LEGAL_HOLDS = _table(
    "legal_holds",
    "hold_id",
    "patient_id lesion_id image_id reason set_by set_at released_by released_at salt",
)
CLOSED_RECORDS = _table("closed_records", "patient_id", "closed_at closed_by")
#: With the encounters that are the patient's.
PATIENT_RECORDS = _table(
    "patient_records",
    "patient_id",
    "birth_date sex personal_melanoma personal_skin_cancer family_melanoma immunosuppression encounters salt",
)
SITE_OPERATING_POINTS = _table(
    "site_operating_points",
    "model_id model_digest id",
    "set_at operating_points approved_by reason report_sha256",
)
#: What goes with the image when it is erased, and what stays.
REVIEW_NOTES = AuditedTable("review_notes", ("review_id",), ("note", "note_salt"))
REVIEWS = _table(
    "reviews",
    "review_id",
    "assessment_id clinician request_id recorded_at decision reason diagnosis level urgency referral_made follow_up_by"
    " impression_diagnosis intended_referral before_answer answers salt",
)
LESION_OUTCOMES = _table(
    "lesion_outcomes",
    "outcome_id",
    "lesion_id image_id kind diagnosis malignant code code_system observed_on source recorded_by request_id recorded_at salt",
)
#: Which lesions are one; who ended a link, and what it left open, is null or empty while it is in force.
LESION_LINKS = _table(
    "lesion_links",
    "link_id",
    "lesion_id earlier_lesion_id patient_id reason linked_by linked_at request_id"
    " ended_by ended_at end_reason end_request_id left_open",
)
#: Whom an EHR means by its ids.
HOOK_IDENTITIES = _table("hook_identities", "client kind fhir_id", "own_id mapped_at mapped_by")
#: Without the comment: that goes with the image, and the rest stands in the event.
HOOK_FEEDBACK = _table(
    "hook_feedback", "feedback_id", "card_id outcome reason_system reason_code outcome_at recorded_at"
)
#: An image as it came, and what it is to be assessed with. The context is guessed easily: its salt is the sealed image's
#: authentication tag, which vouches for the image, too, and goes with it.
LESION_IMAGES = _table(
    "lesion_images",
    "image_id",
    "assessment_id lesion_id patient_id encounter_id created_at content_type width height data_key_id tag"
    " context top_k licences confirmed_only actor request_id",
)
#: What was made of an image: the answer by its `json_digest`, and the vector that it is compared by (hexadecimal SHA-256).
ASSESSMENTS = _table(
    "assessments",
    "assessment_id",
    "outcome answer failure demand_level demand_urgency demand_answered_at embedding_space embedding",
)


def vouch(event: AuditEvent, table: AuditedTable, rows: Iterable[Row]) -> AuditEvent:
    """Have an event hold the digests of rows as they are after it; null for those with a true `gone`.

    Rows of an older schema, which lack a column, have none.
    """
    rows = [row for row in rows if all(column in row for column in table.columns)]
    digests = {table.name_of(row): None if row.get("gone", False) else table.digest_of(row) for row in rows}
    known: Any = event.detail.get(ROWS, {})
    return replace(event, detail={**event.detail, ROWS: {**known, table.name: digests}})


def json_digest(text: str) -> str:
    """SHA-256 of a JSON text as a jsonb would give it back: keys sorted, 1.0 and 1 the same, as -0.0 and 0 and 1e16 are."""
    settled = json.loads(text, parse_float=_number, parse_int=_number)
    return sha256(json.dumps(settled, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _number(text: str) -> float:
    return float(text) + 0.0


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, UUID | str):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in a digest")
