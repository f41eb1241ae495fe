"""Whether the rows beside the audit log are what its events say: both ways, in one snapshot of the database.

The chain shows that the events are what was written; here the rows are held against them. Whoever changes a row behind the
service's back, or adds or removes one, has no event for it. Rows whose events are from before events held digests are
held against what those say in clear, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from serve_app.audit.rows import (
    ASSESSMENTS,
    CARE_ASSIGNMENTS,
    CLOSED_RECORDS,
    EMERGENCY_ACCESSES,
    HOOK_FEEDBACK,
    HOOK_IDENTITIES,
    LEGAL_HOLDS,
    LESION_IMAGES,
    LESION_LINKS,
    LESION_OUTCOMES,
    PATIENT_RECORDS,
    REVIEW_NOTES,
    REVIEWS,
    REVOCATIONS,
    ROWS,
    SITE_OPERATING_POINTS,
    AuditedTable,
    Row,
)
from serve_app.keys.envelope import TAG_BYTES
from serve_app.keys.receipts import ErasureReason, Receipt
from serve_app.records.lesions import assessment_row
from serve_app.records.pool import Pool, queries

_SQL = queries("reconciliation")
#: Tables of which each row stands for itself, with the statement that reads them.
_PLAIN = {
    **{
        table: _SQL[table.name]
        for table in (
            CARE_ASSIGNMENTS,
            REVOCATIONS,
            EMERGENCY_ACCESSES,
            LEGAL_HOLDS,
            CLOSED_RECORDS,
            SITE_OPERATING_POINTS,
            REVIEWS,
            LESION_OUTCOMES,
            LESION_LINKS,
            HOOK_IDENTITIES,
            HOOK_FEEDBACK,
        )
    },
    PATIENT_RECORDS: queries("patients")["loaded"].replace("$1", "NULL"),
}
#: Actions whose events say in clear which row they are of, and whether they leave it there: older ones hold nothing else.
_OF_ROWS: Mapping[str, tuple[AuditedTable, bool]] = {
    "assign": (CARE_ASSIGNMENTS, True),
    "end_assignment": (CARE_ASSIGNMENTS, False),
    "revoke": (REVOCATIONS, True),
    "restore": (REVOCATIONS, False),
    "break_glass": (EMERGENCY_ACCESSES, True),
    "review_access": (EMERGENCY_ACCESSES, True),
    "end_emergency": (EMERGENCY_ACCESSES, True),
    "hold_set": (LEGAL_HOLDS, True),
    "hold_release": (LEGAL_HOLDS, True),
    "record_close": (CLOSED_RECORDS, True),
    "record_reopen": (CLOSED_RECORDS, False),
    "patient_load": (PATIENT_RECORDS, True),
    "operating_points_set": (SITE_OPERATING_POINTS, True),
    "classify": (ASSESSMENTS, True),
}
_PUBLICATIONS = ("model_publish", "model_promote", "model_rollback")
_OTHERS = ("upload", "confirm", "erase", "erased", "disclose", *_PUBLICATIONS)
#: Of a row's key, what such an event says: of care not the time that it began, of operating points whose they are.
_NAMED_WITH = 2
_PREFETCH = 500

_DIFFERS, _GONE, _UNKNOWN = "is not what its event says", "is gone", "is in no event"


@dataclass(frozen=True, slots=True)
class Difference:
    """A row that is not as the log says: of which table, its name, what is wrong, and the event that it contradicts."""

    table: str
    row: str
    what: str
    event_id: int | None

    def __str__(self) -> str:
        """In words."""
        by = "" if self.event_id is None else f" (event {self.event_id})"
        return f"{self.table} {self.row}: {self.what}{by}"


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """How many rows were held against the log, how many of those have no digest there, and what differs."""

    compared: int
    without_digest: int
    differences: tuple[Difference, ...]


async def reconcile(pool: Pool) -> Reconciliation:
    """Hold every row that decides access, erasure or what a clinician reads against the newest event that names it."""
    async with (
        pool.connection() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        account = _Account()
        async for event in connection.cursor(_SQL["events"], [*_OF_ROWS, *_OTHERS], ROWS, prefetch=_PREFETCH):
            account.read(event)
        for table, query in _PLAIN.items():
            async for row in connection.cursor(query, prefetch=_PREFETCH):
                account.hold(table, row)
        async for row in connection.cursor(_SQL["images"], TAG_BYTES, prefetch=_PREFETCH):
            account.hold_image(row)
        for query, hold in (
            ("erasures", account.hold_erasure),
            ("review_notes", account.hold_note),
            ("messages", account.hold_message),
            ("serving", account.hold_serving),
            ("publications", account.hold_publication),
        ):
            async for row in connection.cursor(_SQL[query], prefetch=_PREFETCH):
                hold(row)
        return account.close()


class _Account:
    """What the events say, row by row, and what the rows make of it. What was met in both is struck off."""

    def __init__(self) -> None:
        #: By table and row: the newest event with a digest, and that; None where the row has ended.
        self._digests: dict[tuple[str, str], tuple[int, str | None]] = {}
        #: By table and what older events say of a row: the event that requires one to be there; None where none must be.
        self._named: dict[tuple[str, ...], int | None] = {}
        #: By image: the event, and the ids that it names (lesion, patient, assessment).
        self._uploads: dict[UUID, tuple[int, tuple[object, ...]]] = {}
        self._confirmed: dict[UUID, tuple[int, str]] = {}
        #: By image: the event, and receipt, reason and actor.
        self._erasures: dict[UUID, tuple[int, tuple[object, ...]]] = {}
        self._erased: set[UUID] = set()
        self._receipts: dict[str, tuple[int, str]] = {}
        #: By message that an event queued: the event, and the image that it is about, if any.
        self._messages: dict[str, tuple[int, UUID | None]] = {}
        #: What the PMS was told: assessments, and messages of other kinds.
        self._disclosed: set[UUID | str] = set()
        self._serving: tuple[int, Row] | None = None
        self._publications: dict[int, tuple[int, Row]] = {}
        self._oldest_publication: int | None = None
        self._compared = self._without = 0
        self._differences: list[Difference] = []

    def read(self, event: Row) -> None:
        """Take in the next event; one that is not of the form that this service writes is a difference."""
        try:
            self._read(event)
        except (AttributeError, KeyError, TypeError, ValueError):
            name = f"{event['event_id']} ({event['action']})"
            self._differ("audit_events", name, "has no detail of this service's")

    def _read(self, event: Row) -> None:
        number, action, detail = event["event_id"], event["action"], event["detail"]
        digests = detail.get(ROWS, {})
        for table, rows in digests.items():
            self._digests.update({(table, name): (number, digest) for name, digest in rows.items()})
        if event["outcome"] != "success" and action != "classify":
            return
        if action in _OF_ROWS:
            table, stays = _OF_ROWS[action]
            if (named := _named_by(table, event)) is not None:
                older = table.name not in digests
                if older or named in self._named:  # else rows of this name are all told apart by digests
                    self._named[named] = number if stays and older else None
                if older:  # of a replica that is not updated yet: what was known of the row holds no longer
                    self._forget(table, named)
        if action in _PUBLICATIONS:
            self._serving = number, detail["after"]
            publication = detail["publication_id"]
            self._publications[publication] = number, detail | {"action": action.removeprefix("model_")}
            if self._oldest_publication is None:
                self._oldest_publication = publication
            return
        self._read_of_message(number, action, event)
        if event["image_id"] is not None:
            self._read_of_image(number, action, event, event["image_id"])

    def _read_of_message(self, number: int, action: str, event: Row) -> None:
        detail = event["detail"]
        message, image = detail.get("message_id"), detail.get("encounter_of")
        if action == "disclose":  # the event of an assessment's names no message
            self._disclosed.add(message or event["assessment_id"])
        elif message is not None:
            self._messages[message] = number, event["image_id"] if image is None else UUID(image)

    def _forget(self, table: AuditedTable, named: tuple[str, ...]) -> None:
        for each in [
            key
            for key in self._digests
            if key[0] == table.name and (table.name, *table.key_of(key[1])[:_NAMED_WITH]) == named
        ]:
            del self._digests[each]

    def _read_of_image(self, number: int, action: str, event: Row, image: UUID) -> None:
        detail = event["detail"]
        if action == "upload":
            ids = (event["lesion_id"], event["patient_id"], event["assessment_id"])
            self._uploads[image] = number, ids
        elif action == "confirm":
            self._confirmed.setdefault(image, (number, event["actor"]))
        elif action == "erase" and "reason" in detail:  # and not the repetition of a request
            self._erasures[image] = number, (detail["receipt_id"], detail["reason"], event["actor"])
            self._erased.add(image)
        elif action == "erased":
            self._receipts[detail["receipt_id"]] = number, detail["record_hash"]

    def hold(self, table: AuditedTable, row: Row) -> None:
        """Hold a row of a plain table against its newest event."""
        self._compared += 1
        name, named = table.name_of(row), _named_by_row(table, row)
        older = named in self._named
        if older:  # of several rows that were named so, none is required any more
            self._named[named] = None
        self._hold(table, name, row, self._digests.pop((table.name, name), None), older=older)

    def _hold(
        self, table: AuditedTable, name: str, row: Row, known: tuple[int, str | None] | None, *, older: bool
    ) -> None:
        if known is not None:
            number, digest = known
            if digest is None:
                self._differ(table.name, name, "is there, and its event ended it", number)
            elif digest != table.digest_of(row):
                self._differ(table.name, name, _DIFFERS, number)
        elif older:
            self._without += 1
        else:
            self._differ(table.name, name, _UNKNOWN)

    def hold_image(self, row: Row) -> None:
        """Hold an image with its lesion and its assessment against what was recorded of them."""
        lesion, image, assessment = (row[f"of_{kind}"] for kind in ("lesion", "image", "assessment"))
        self._compared += 1
        upload, ids = self._uploads.pop(image, (None, ()))
        if upload is None:
            rows = ("lesion_images", image), ("lesions", lesion), ("assessments", assessment)
            table, missing = next(each for each in rows if each[1] is not None)
            self._differ(table, str(missing), _UNKNOWN)
            return
        name, answered = str(image), ("assessments", str(assessment))
        came, told = self._digests.pop(("lesion_images", name), None), self._digests.pop(answered, None)
        older = self._named.pop(answered, None)
        confirmation, by = self._confirmed.pop(image, (None, None))
        if by != row["confirmed_by"]:
            self._differ("assessments", f"of image {name}: who confirmed it", _DIFFERS, confirmation)
        if ids != (lesion, row["patient_id"], assessment):
            self._differ("lesion_images", name, _DIFFERS, upload)
        elif image in self._erased:
            self._hold_erased(row, name, str(assessment))
        elif row["erased_at"] is not None:
            self._differ("lesion_images", name, "is erased, and no event says so")
        else:
            self._hold(LESION_IMAGES, name, row, came, older=True)
            if row["vectors"] > 1:
                self._differ("lesion_embeddings", name, _UNKNOWN)
            if row["outcome"] != "pending":
                done = assessment_row(row)
                self._hold(ASSESSMENTS, str(assessment), done, told, older=older is not None)
            elif (number := told[0] if told else older) is not None:
                self._differ(*answered, "is pending, and its event finished it", number)
            elif row["vectors"] or row["demand_level"] is not None:
                self._differ(*answered, _UNKNOWN)

    def _hold_erased(self, row: Row, image: str, assessment: str) -> None:
        number = self._erasures.get(row["of_image"], (None,))[0]
        left = row["answer"], row["failure"], row["context"] or None, row["vectors"] or None
        if row["erased_at"] is None or any(part is not None for part in left):
            self._differ("lesion_images", image, "is there, and its event erased it", number)
        elif row["outcome"] not in {"erased", "cancelled"}:
            self._differ("assessments", assessment, _DIFFERS, number)

    def hold_note(self, row: Row) -> None:
        """Hold a clinician's note against its event; of an erased image it is gone."""
        if row["note"] is not None:
            self.hold(REVIEW_NOTES, row)
        elif row["image_id"] in self._erased:
            self._digests.pop((REVIEW_NOTES.name, str(row["review_id"])), None)

    def hold_erasure(self, row: Row) -> None:
        """Hold an erasure and its receipt against the events of both."""
        self._compared += 1
        receipt = str(row["receipt_id"])
        number, told = self._erasures.pop(row["image_id"], (None, ()))
        proof, value = self._receipts.pop(receipt, (None, None))
        if told != (receipt, row["reason"], row["actor"]):
            self._differ("erasures", receipt, _UNKNOWN if number is None else _DIFFERS, number)
        elif row["record_hash"] is None:
            if proof is not None:
                self._differ("erasure_receipts", receipt, _GONE, proof)
        elif value != row["record_hash"].hex() or value != _record_hash(row):
            self._differ("erasure_receipts", receipt, _UNKNOWN if proof is None else _DIFFERS, proof)

    def hold_message(self, row: Row) -> None:
        """Hold a message to the PMS against its image, and against the event of its delivery."""
        self._compared += 1
        name = str(row["message_id"])
        self._messages.pop(name, None)
        if row["encounter_id"] != row["of_image"]:
            self._differ("outbox", name, "is for another encounter than its image's")
        told_of = row["assessment_id"] if row["kind"] == "assessment" else name
        told = told_of in self._disclosed or row["image_id"] in self._erased
        if row["delivered"] and not told:
            self._differ("outbox", name, "is noted as delivered, and no event says so")

    def hold_serving(self, row: Row) -> None:
        """Hold the model that answers against the newest event that let one answer."""
        self._compared += 1
        number, after = self._serving or (None, None)
        self._serving = None
        if number is None:
            self._without += 1
        elif dict(row) != after:
            self._differ("serving", row["model_id"], _DIFFERS, number)

    def hold_publication(self, row: Row) -> None:
        """Hold an entry of the models' history against its event."""
        self._compared += 1
        publication = row["publication_id"]
        number, detail = self._publications.pop(publication, (None, {}))
        if number is not None:
            if any(value != (detail | detail["after"])[name] for name, value in row.items()):
                self._differ("publications", str(publication), _DIFFERS, number)
        elif self._oldest_publication is None or publication < self._oldest_publication:
            self._without += 1
        else:
            self._differ("publications", str(publication), _UNKNOWN)

    def close(self) -> Reconciliation:
        """Say what was found; whatever an event left there and no row is, is gone."""
        missing = {(each.table, each.row): each for each in self._missing()}
        self._differences += sorted(missing.values(), key=lambda each: each.event_id or 0)
        return Reconciliation(self._compared, self._without, tuple(self._differences))

    def _missing(self) -> Iterator[Difference]:
        gone: list[tuple[str, object, int]] = [
            *(
                (table, name, number)
                for (table, name), (number, digest) in self._digests.items()
                if digest is not None
            ),
            *(
                (name[0], " ".join(name[1:]), number)
                for name, number in self._named.items()
                if number is not None
            ),
            *(("lesion_images", image, number) for image, (number, _) in self._uploads.items()),
            *(("assessments", f"of image {image}", number) for image, (number, _) in self._confirmed.items()),
            *(("erasures", told[0], number) for number, told in self._erasures.values()),
            *(("erasure_receipts", receipt, number) for receipt, (number, _) in self._receipts.items()),
            *(
                ("outbox", message, number)
                for message, (number, image) in self._messages.items()
                if image not in self._erased
            ),
            *(("publications", name, number) for name, (number, _) in self._publications.items()),
        ]
        if self._serving is not None:
            gone.append(("serving", self._serving[1]["model_id"], self._serving[0]))
        return (Difference(table, str(name), _GONE, number) for table, name, number in gone)

    def _differ(self, table: str, row: str, what: str, event_id: int | None = None) -> None:
        self._differences.append(Difference(table, row, what, event_id))


def _named_by(table: AuditedTable, event: Row) -> tuple[str, ...] | None:
    """The row that an event is of, as far as it says so beside the digests; None for an event of none."""
    detail: Mapping[str, Any] = event["detail"]
    found: tuple[str, ...] | None
    match table.name:
        case "care_assignments":
            found = (detail["subject"], event["patient_id"]) if "subject" in detail else None
        case "revocations":  # an event of this name is also that of a restored backup
            kind = next((kind for kind in ("subject", "token") if kind in detail), None)
            found = None if kind is None else (kind, detail[kind])
        case "emergency_accesses":
            emergency = detail.get("emergency_id") or detail.get("emergency_access")
            found = None if emergency is None else (emergency,)
        case "site_operating_points":
            found = (detail["model_id"], detail["model_digest"])
        case "legal_holds":
            found = (detail["hold_id"],)
        case "assessments":
            found = (str(event["assessment_id"]),)
        case _:
            found = (event["patient_id"],)
    return None if found is None else (table.name, *found)


def _named_by_row(table: AuditedTable, row: Row) -> tuple[str, ...]:
    return (table.name, *(str(row[name]) for name in table.key[:_NAMED_WITH]))


def _record_hash(row: Row) -> str | None:
    """The hash of a receipt as the rows have it; None where they have none that this service could have written."""
    values = {name: row[name] for name in Receipt.__dataclass_fields__}
    try:
        return Receipt(**values | {"reason": ErasureReason(row["reason"])}).record_hash.hex()
    except ValueError:
        return None
