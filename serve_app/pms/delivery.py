"""Telling the PMS what there is to tell: the outbox's messages, delivered at least once and kept once.

Before anything is sent, the PMS itself must say that the encounter is the patient's, whatever was known at the upload:
until it does, the message waits. It keeps one of what it gets twice, by the Idempotency-Key; we note and audit its
acknowledgement once. A message is noted as delivered only for an acknowledgement that names what
was told: a gateway's friendly page is none. What each kind of message says is in messages.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
import logging
import random
from typing import Any

from serve_app.audit.events import OUTBOX, AuditEvent, AuditOutcome
from serve_app.domain.assessment import Outcome
from serve_app.domain.errors import (
    DirectoryUnavailable,
    PmsRefused,
    PmsUnavailable,
    RecordsUnavailable,
    WrongEncounter,
)
from serve_app.pms.client import CircuitBreaker, PmsClient, State
from serve_app.pms.directory import PatientDirectory, PmsDirectory, RecordConsultation
from serve_app.pms.messages import Resources, idempotency_key, pms_resources
from serve_app.records.lesion_rows import AssessmentRecord
from serve_app.records.lesions import LesionStore
from serve_app.records.outbox import ClaimedMessage, MessageKind, Outbox
from serve_app.records.patients import PatientTable
from serve_app.records.pool import Pool
from serve_app.settings import Settings

logger = logging.getLogger("derm.delivery")

#: For one question or message; the PMS may have to write it down.
TIMEOUT_S = 10.0
#: How long a message is one sender's: longer than the question, the message and their statements may take.
LEASE_S = 60.0
#: The wait after the first failed attempt, doubled by each further one, and its limit.
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 300.0
#: How long a message that the PMS refuses is tried again: a wrong route or a late registration is
#: mended in that time, and whatever else the encounter has to tell waits no longer behind it.
REFUSED_FOR = timedelta(hours=1)
#: Attempts that fail although other messages get through before a message is dead: it is not the PMS that is away.
#: With the waits between them more than half an hour; while nothing gets through, none counts.
DEAD_AFTER_SETBACKS = 12
#: Answers of 4xx that say nothing about the message: our token, our pace, or an attempt still running.
_NOT_THE_MESSAGE = frozenset({401, 403, 407, 408, 409, 425, 429})
_BATCH = 16
PERIOD_S = 1.0
#: Nothing was asked: the PMS is left alone for a while.
_LEFT_ALONE = "circuit_open"
#: What a fault of asking for the encounter begins with; one that the PMS has none of is ENCOUNTER_UNKNOWN.
_ASKING = "encounter_"
ENCOUNTER_UNKNOWN = f"{_ASKING}unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Delivers what is due. Any number may run, in any number of processes: claims pass each other by."""

    outbox: Outbox
    records: LesionStore
    client: PmsClient
    resources: Resources
    dead_after: timedelta
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    first_wait_s: float = FIRST_WAIT_S
    timeout_s: float = TIMEOUT_S

    async def deliver_due(self, *, lease_s: float = LEASE_S) -> int:
        """Deliver what is due now, one message of each encounter at a time; returns how many were.

        RecordsUnavailable as the outbox says; what was claimed then comes up again after its lease.
        """
        delivered = 0
        while (state := self.breaker.state) is not State.OPEN:
            # A PMS that was away is tried with one message, not with all that wait.
            limit = _BATCH if state is State.CLOSED else 1
            claimed = await self.outbox.claim(kinds=self.resources, lease_s=lease_s, limit=limit)
            outcomes = await asyncio.gather(*map(self._deliver, claimed), return_exceptions=True)
            delivered += sum(outcome is True for outcome in outcomes)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            if not any(outcomes):
                break
        return delivered

    async def _deliver(self, message: ClaimedMessage) -> bool:
        try:
            return await self._attempt(message)
        except PmsUnavailable as fault:
            await self._wait_or_give_up(message, fault)
        except RecordsUnavailable:
            raise
        except Exception as defect:  # noqa: BLE001 - our own; the other messages go on, and this one ends, too
            await self._wait_or_give_up(message, PmsUnavailable(f"defect_{type(defect).__name__}"))
        return False

    async def _attempt(self, message: ClaimedMessage) -> bool:
        found = None
        if message.assessment_id is not None and message.encounter_id is not None:
            found = await self.records.assessment_record(message.assessment_id)
            if (
                found is None or found.image.outcome is Outcome.PENDING
            ):  # the statements that queue write neither
                await self.outbox.give_up(message.message_id, error="not_finished")
                return False
            # What the PMS has, it is told the erasure of, whosever the encounter is now.
            follows = found.image.erasure is not None and message.sent_at is not None
            if not follows and await self._owner(message.encounter_id) != found.patient_id:
                await self._withhold(message, found)
                return False
        body = await self.resources[message.kind].body(message, found)
        if not self.breaker.enter():
            raise PmsUnavailable(_LEFT_ALONE)
        if not await self.outbox.note_sent(message.message_id):  # its image was erased meanwhile
            return False
        await self._post(message, body, idempotency_key(message, found))
        told = None if found is None else found.image.outcome
        event = _disclosure(message, found, "success", outcome=told, attempts=message.attempts)
        return await self.outbox.deliver(message.message_id, told=told, event=event)

    async def _owner(self, encounter_id: str) -> str:
        """Ask the PMS, now and never a cache, whose an encounter is; PmsRefused when it has none of that id."""
        encounters = PmsDirectory(self.client, timeout_s=self.timeout_s, max_age_s=0.0, breaker=self.breaker)
        try:
            owner = await encounters.patient_of(encounter_id)
        except DirectoryUnavailable as fault:
            code = str(fault)
            raise PmsUnavailable(code if code == _LEFT_ALONE else f"{_ASKING}{code}") from None
        if owner is None:
            raise PmsRefused(ENCOUNTER_UNKNOWN)
        return owner

    async def _withhold(self, message: ClaimedMessage, found: AssessmentRecord) -> None:
        """Never send this to an encounter of another patient: a finding, and an event.

        Of an erasure nothing is left to say: what was never sent there need not be deleted there.
        """
        event = _disclosure(message, found, "denied", code=WrongEncounter.code)
        if found.image.erasure is not None:
            await self.outbox.drop(message.message_id, error=WrongEncounter.code, event=event)
        else:
            await self.outbox.give_up(message.message_id, error=WrongEncounter.code, event=event)
        logger.error("Message %s is not sent: its encounter is another patient's", message.message_id)

    async def _post(self, message: ClaimedMessage, body: Mapping[str, Any], key: str) -> None:
        """Send one; PmsUnavailable unless the PMS acknowledges this very one, PmsRefused when it refuses it."""
        resource = self.resources[message.kind]
        sent: dict[str, Any] = {"body": body, "idempotency_key": key, "media_type": resource.media_type}
        try:
            answer = await self.client.post(*resource.path(message), **sent, timeout_s=self.timeout_s)
        except PmsUnavailable:
            self.breaker.fail()
            raise
        if answer.status >= 500 or answer.status in _NOT_THE_MESSAGE:
            self.breaker.fail()
            raise PmsUnavailable(f"http_{answer.status}")
        self.breaker.succeed()
        if answer.status >= 400:
            raise PmsRefused(f"http_{answer.status}")
        if answer.status >= 300 or answer.body is None:
            raise PmsUnavailable(f"http_{answer.status}_without_acknowledgement")
        if answer.body.get(resource.acknowledged_by) != body[resource.acknowledged_by]:
            raise PmsUnavailable("acknowledged_another")

    async def _wait_or_give_up(self, message: ClaimedMessage, fault: PmsUnavailable) -> None:
        if (code := str(fault)) == _LEFT_ALONE:
            await self.outbox.postpone(
                message.message_id, delay_s=self.first_wait_s, error=code, counts=False
            )
            return
        limit = min(REFUSED_FOR, self.dead_after) if isinstance(fault, PmsRefused) else self.dead_after
        counts = code.removeprefix(_ASKING) not in {f"http_{status}" for status in _NOT_THE_MESSAGE}
        late = datetime.now(UTC) - message.waiting_since >= limit
        if late or (counts and message.setbacks >= DEAD_AFTER_SETBACKS):
            await self.outbox.give_up(message.message_id, error=code)
            logger.error("Message %s is dead: %s", message.message_id, code)
            return
        delay = wait_s(message.attempts, first_s=self.first_wait_s)
        await self.outbox.postpone(message.message_id, delay_s=delay, error=code, counts=counts)
        logger.warning("Message %s waits %.0f s: %s", message.message_id, delay, code)


def wait_s(attempts: int, *, first_s: float = FIRST_WAIT_S) -> float:
    """Seconds before the next attempt: doubled each time up to the limit, then spread over its upper half."""
    longest = min(LONGEST_WAIT_S, first_s * 2.0 ** min(attempts - 1, 32))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


def _disclosure(
    message: ClaimedMessage, found: AssessmentRecord | None, ended: AuditOutcome, **detail: object
) -> AuditEvent:
    """Say what was sent, or withheld; of all but assessments also which message of which kind."""
    if message.kind is not MessageKind.ASSESSMENT:
        detail |= {"message_id": str(message.message_id), "kind": message.kind, "told_id": message.told_id}
    return AuditEvent(
        action="disclose",
        actor=OUTBOX,
        outcome=ended,
        patient_id=found.patient_id if found else None,
        lesion_id=found.lesion_id if found else None,
        image_id=found.image.image_id if found else None,
        assessment_id=message.assessment_id,
        request_id=idempotency_key(message, found),
        detail={"recipient": "pms", **detail},
    )


@dataclass(frozen=True, slots=True)
class PmsConnection:
    """Client and delivery are None where they are not configured."""

    client: PmsClient | None
    consultation: RecordConsultation
    delivery: Delivery | None

    async def describe(self) -> dict[str, int | float | None] | None:
        """For /readyz: what waits for the PMS and what is dead; None where nothing is delivered."""
        return None if self.delivery is None else asdict(await self.delivery.outbox.counts())

    async def close(self) -> None:
        """Close the connections to the PMS."""
        if self.client is not None:
            await self.client.close()


def open_pms(settings: Settings, pool: Pool, records: LesionStore) -> PmsConnection:
    """Put together what the settings ask for; nothing connects before its first use."""
    url, client = settings.pms_url, None
    directory: PatientDirectory | None = None
    delivery = None
    if settings.patient_directory == "local":
        directory = PatientTable(pool, timeout_s=settings.pms_timeout_s)
    if url is not None:
        client = PmsClient(url, token_file=settings.pms_token_file, ca_file=settings.pms_ca_file)
        if settings.patient_directory == "pms":
            directory = PmsDirectory(client, timeout_s=settings.pms_timeout_s, max_age_s=settings.pms_cache_s)
        if settings.pms_deliver:
            delivery = Delivery(
                outbox=Outbox(pool),
                records=records,
                client=client,
                resources=pms_resources(pool, pms_url=url),
                dead_after=timedelta(days=settings.pms_dead_after_days),
            )
    return PmsConnection(client, RecordConsultation(directory), delivery)
