"""What CDS Hooks are answered from and leave behind: whom an EHR means, what is due, cards, feedback, tokens taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import date, datetime, timedelta
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal
from uuid import UUID

from serve_app.audit.events import AuditEvent, account_event
from serve_app.audit.rows import HOOK_FEEDBACK, HOOK_IDENTITIES, vouch
from serve_app.domain.assessment import RiskLevel, Urgency
from serve_app.domain.errors import Conflict, NotFound
from serve_app.domain.identifiers import new_id
from serve_app.domain.review import CardKind, HookFeedback
from serve_app.records.audit_log import event_parameters, record_event
from serve_app.records.pool import Store, queries
from serve_app.sql import bind

_SQL = queries("hooks")

#: How long a token that was taken is remembered: three times as long as one is valid, whatever the clocks say.
REMEMBERED = timedelta(minutes=15)

IdentityKind = Literal["user", "patient"]


@dataclass(frozen=True, slots=True)
class Meant:
    """Whom an EHR means: the clinician and the patient as they are known here, None where they are not."""

    subject: str | None
    patient_id: str | None
    revoked: bool


@dataclass(frozen=True, slots=True)
class Identity:
    """By `fhir_id` (`Practitioner/123`; of a patient `123`), the EHR `client` means `own_id`."""

    client: str
    kind: IdentityKind
    fhir_id: str
    own_id: str


@dataclass(frozen=True, slots=True)
class MappedIdentity(Identity):
    """An identity on record."""

    mapped_at: datetime
    mapped_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What a lesion waits for. Of an open demand the first image that demands the most; of a follow-up the one reviewed.

    `since`: when that image was sent, or the review was recorded. `site` is the image's, None once that is erased.
    """

    kind: CardKind
    lesion_id: UUID
    image_id: UUID
    assessment_id: UUID
    review_id: UUID | None
    level: RiskLevel | None
    urgency: Urgency | None
    since: datetime
    follow_up_by: date | None
    site: str | None
    encounter_id: str | None
    erased: bool


@dataclass(frozen=True, slots=True)
class GivenFeedback:
    """What an EHR says became of a card."""

    card_id: UUID
    outcome: Literal["accepted", "overridden"]
    outcome_at: datetime
    reason_system: str | None = None
    reason_code: str | None = None
    comment: str | None = None


class HookStore(Store):
    """Reads and writes for the CDS Hooks service; mapping needs the owner's role."""

    async def take_token(self, client: str, token_id: str) -> bool:
        """Take a token of this id; False when any replica did before."""
        taken: bool | None = await self._pool.fetchval(
            _SQL["take_token"], client, sha256(token_id.encode()).digest()
        )
        return taken is True

    async def forget_tokens(self) -> None:
        """Let go of the tokens that have long expired."""
        await self._pool.execute(_SQL["forget_tokens"], REMEMBERED)

    async def identify(self, client: str, *, user: str, patient: str) -> Meant:
        """Say whom the EHR means."""
        (meant,) = await self._pool.find_all(Meant, _SQL["identify"], client, user, patient)
        return meant

    async def due(self, patient_id: str | None) -> list[Due]:
        """List what the patient's lesions wait for, the most pressing first; of nobody nothing."""
        return await self._pool.find_all(Due, _SQL["due"], patient_id)

    async def show(self, client: str, cards: Sequence[tuple[UUID, Due]], *, event: AuditEvent) -> None:
        """Note which cards the EHR is given, with the audit event."""
        columns = {
            "cards": [card_id for card_id, _ in cards],
            "kinds": [due.kind for _, due in cards],
            "assessments": [due.assessment_id for _, due in cards],
            "reviews": [due.review_id for _, due in cards],
        }
        await self._pool.execute(*bind(_SQL["show"], {"client": client, **columns} | event_parameters(event)))

    async def add_feedback(self, client: str, given: Sequence[GivenFeedback], *, event: AuditEvent) -> None:
        """Add what became of cards, with an event for each patient whose cards they are; what was told before adds nothing.

        NotFound, and nothing, when one of them is no card that this EHR was given.
        """
        async with self._pool.connection() as connection, connection.transaction():
            shown = await connection.fetch(_SQL["shown"], client, [each.card_id for each in given])
            cards = {row["card_id"]: row for row in shown}
            if any(each.card_id not in cards for each in given):
                raise NotFound("card: this service has given you no such card; nothing was recorded.")
            for patient_id, group in groupby(shown, key=itemgetter("patient_id")):
                added, told = (
                    [],
                    [each for card in group for each in given if each.card_id == card["card_id"]],
                )
                for each in told:
                    values = (
                        each.outcome,
                        each.reason_system,
                        each.reason_code,
                        each.comment,
                        each.outcome_at,
                    )
                    added += await connection.fetch(_SQL["add_feedback"], new_id(), each.card_id, *values)
                said = [{"card_id": str(row["card_id"]), "outcome": row["outcome"]} for row in added]
                about: dict[str, Any] = {
                    "patient_id": patient_id,
                    "detail": {**event.detail, "feedback": said},
                }
                if len({each.card_id for each in told}) == 1:
                    card = cards[told[0].card_id]
                    about |= {name: card[name] for name in ("lesion_id", "image_id", "assessment_id")}
                await record_event(connection, vouch(replace(event, **about), HOOK_FEEDBACK, added))

    async def feedback(self, lesion_id: UUID) -> list[HookFeedback]:
        """Tell what became of a lesion's cards, oldest first."""
        return await self._pool.find_all(HookFeedback, _SQL["feedback_of_lesion"], lesion_id)

    async def map(self, identities: Iterable[Identity]) -> int:
        """Have EHRs mean somebody: all of these, or none; returns how many are new. Conflict for an id that means another."""
        known = {(each.client, each.kind, each.fhir_id): each.own_id for each in await self.identities()}
        made = 0
        async with self._pool.connection() as connection, connection.transaction():
            for each in identities:
                before = known.setdefault((each.client, each.kind, each.fhir_id), each.own_id)
                if before != each.own_id:
                    raise Conflict(f"{each.client}: {each.kind} {each.fhir_id} is {before}; unmap it first.")
                event = _mapping_event("hook_map", each)
                if rows := await connection.fetch(_SQL["map"], *astuple(each), event.actor):
                    await record_event(connection, vouch(event, HOOK_IDENTITIES, rows))
                    made += 1
        return made

    async def unmap(self, client: str, kind: IdentityKind, fhir_id: str) -> Identity | None:
        """Have an EHR mean nobody by an id, from the next request on; None when it means nobody."""
        async with self._pool.connection() as connection, connection.transaction():
            rows = await connection.fetch(_SQL["unmap"], client, kind, fhir_id)
            if not rows:
                return None
            ended = Identity(client, kind, fhir_id, rows[0]["own_id"])
            await record_event(connection, vouch(_mapping_event("hook_unmap", ended), HOOK_IDENTITIES, rows))
            return ended

    async def identities(self, client: str | None = None) -> list[MappedIdentity]:
        """List whom EHRs mean: one EHR's, or all."""
        return await self._pool.find_all(MappedIdentity, _SQL["identities"], client)


def _mapping_event(action: str, identity: Identity) -> AuditEvent:
    whom = {"subject": identity.own_id} if identity.kind == "user" else {}
    detail = {"client": identity.client, identity.kind: identity.fhir_id, **whom}
    return account_event(action, detail, patient_id=identity.own_id if identity.kind == "patient" else None)
