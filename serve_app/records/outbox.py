"""The transactional outbox: what the PMS is still to be told.

A message is written in the transaction of what it tells (`complete` and `fail` in lesions.sql, `prove` in erasures.sql,
reviews.sql), so that neither exists without the other. It holds no finding: what is sent is read from the record at each
attempt. An assessment has one message of its own kind; delivered, it is sent again when the image is erased.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from serve_app.audit.events import AuditEvent
from serve_app.domain.assessment import Outcome
from serve_app.records.audit_log import event_parameters, record_event
from serve_app.records.pool import Store, queries
from serve_app.sql import bind

_SQL = queries("outbox")


class MessageKind(StrEnum):
    """What a message tells of; each but a report is about an assessment, and goes to the encounter of its image."""

    ASSESSMENT = "assessment"
    REVIEW = "review"
    OUTCOME = "outcome"
    FHIR = "fhir"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class ClaimedMessage:
    """A message that is this sender's to deliver until its lease ends; `attempts` counts this one.

    `subject_id`: the review, outcome or report that is told; None where that is the assessment. A report has neither
    assessment nor encounter. `sent_at`: since when the PMS may have it; None while it has not confirmed the encounter.
    `setbacks`: attempts that failed although another message was delivered since the attempt before.
    """

    message_id: UUID
    kind: MessageKind
    assessment_id: UUID | None
    subject_id: UUID | None
    encounter_id: str | None
    waiting_since: datetime
    attempts: int
    setbacks: int
    sent_at: datetime | None

    @property
    def told_id(self) -> str:
        """The id of what is told, which the PMS's acknowledgement names."""
        return str(self.subject_id or self.assessment_id)


@dataclass(frozen=True, slots=True)
class UndeliveredMessage:
    """A message that waits or is dead, as an operator sees it."""

    message_id: UUID
    kind: MessageKind
    assessment_id: UUID | None
    encounter_id: str | None
    queued_at: datetime
    attempts: int
    due_at: datetime
    sent_at: datetime | None
    last_error: str | None
    dead_at: datetime | None


@dataclass(frozen=True, slots=True)
class OutboxCounts:
    """How many messages wait and how many are dead; the age of the oldest waiting one in seconds.

    Of those that wait, `unconfirmed` are held until the PMS confirms that their encounter is the patient's; of the
    dead, `wrong_encounter` name another patient's.
    """

    waiting: int
    unconfirmed: int
    dead: int
    wrong_encounter: int
    oldest_waiting_s: float | None


class Outbox(Store):
    """The messages as senders and operators use them; the application's role will do."""

    async def claim(
        self, *, kinds: Collection[MessageKind], lease_s: float, limit: int
    ) -> list[ClaimedMessage]:
        """Lease messages of these kinds that are due, at most one of each encounter, and one report: the oldest that waits.

        One of another kind waits for a sender that knows it, and its encounter with it.
        """
        asked = timedelta(seconds=lease_s), limit, list(kinds)
        return await self._pool.find_all(ClaimedMessage, _SQL["claim"], *asked)

    async def deliver(self, message_id: UUID, *, told: Outcome | None, event: AuditEvent) -> bool:
        """Note the PMS's acknowledgement, with the audit event of the disclosure; False when noted before.

        `told` is the outcome that was sent, of an assessment. False, too, when the image was erased meanwhile: the
        disclosure is on record, and the erasure is still to be told.
        """
        values = {"message_id": message_id, "told": told, **event_parameters(event)}
        delivered: bool = await self._pool.fetchval(*bind(_SQL["deliver"], values))
        if not delivered:
            # A statement of its own: that one's snapshot may be older than the erasure it waited for.
            await self._pool.execute(*bind(_SQL["note_overtaken"], values))
        return delivered

    async def postpone(self, message_id: UUID, *, delay_s: float, error: str, counts: bool) -> None:
        """Let a message wait before its next attempt; `error` is a code, without patients' data.

        `counts`: whether this attempt may count against the message, as a setback.
        """
        await self._pool.execute(_SQL["postpone"], message_id, timedelta(seconds=delay_s), error, counts)

    async def note_sent(self, message_id: UUID) -> bool:
        """Note that a message is about to be sent, its encounter being confirmed; False when it was withdrawn."""
        noted: bool | None = await self._pool.fetchval(_SQL["note_sent"], message_id)
        return noted is True

    async def give_up(self, message_id: UUID, *, error: str, event: AuditEvent | None = None) -> None:
        """Send a message no more until an operator says so; with an event, where it says something of a patient."""
        await self._end("give_up", message_id, error, event)

    async def drop(self, message_id: UUID, *, error: str, event: AuditEvent) -> None:
        """Be done with a message that has nothing to tell: the erasure of what was never sent."""
        await self._end("drop", message_id, error, event)

    async def _end(self, query: str, message_id: UUID, error: str, event: AuditEvent | None) -> None:
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_SQL[query], message_id, error)
            if event is not None:
                await record_event(connection, event)

    async def counts(self) -> OutboxCounts:
        """Count what was not delivered."""
        (counts,) = await self._pool.find_all(OutboxCounts, _SQL["counts"])
        return counts

    async def list(self, *, dead_only: bool, limit: int) -> list[UndeliveredMessage]:
        """List what was not delivered, oldest first."""
        return await self._pool.find_all(UndeliveredMessage, _SQL["list"], dead_only, limit)

    async def retry(self, message_id: UUID | None, *, actor: str, request_id: str) -> int:
        """Have one message, or every dead one, sent at once; each on record. Returns how many."""
        revived: int = await self._pool.fetchval(_SQL["retry"], message_id, actor, request_id)
        return revived
