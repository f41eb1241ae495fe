"""The worklist: what waits for somebody in a principal's own care, what is to be done about it, and by when."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Annotated, NamedTuple
from uuid import UUID

from serve_app.domain.assessment import Id, Outcome, RiskLevel, Shape, Time, Urgency, one_of
from serve_app.records.answers import Document, RecordedOutcome
from serve_app.records.pool import Pool, Store, queries
from serve_app.sql import bind

_SQL = queries("worklist")
#: How long before its day a follow-up is listed.
FOLLOW_UP_NOTICE_DAYS = 14


class WorkKind(StrEnum):
    """What waits: a lesion with an open demand, or to be seen again; or an image, by its outcome."""

    DEMAND = "demand"
    REVIEW = "review"
    FOLLOW_UP = "follow_up"
    PENDING = "pending"
    FAILED = "failed"
    REFUSED = "refused"


class WorkAction(StrEnum):
    """What is to be done; each has its message in MESSAGES."""

    REFER_URGENTLY = "refer_urgently"
    REFER_SOON = "refer_soon"
    REFER = "refer"
    REVIEW_IMAGE = "review_image"
    DECIDE = "decide"
    FOLLOW_UP = "follow_up"
    REPEAT_IMAGE = "repeat_image"
    CHECK_LATER = "check_later"


_DECIDE = "Look at the lesion and the answer, then record your decision, with the reason where it differs."
MESSAGES: Mapping[WorkAction, str] = {
    WorkAction.REFER_URGENTLY: (f"The rules demand an urgent referral, as for a suspected cancer. {_DECIDE}"),
    WorkAction.REFER_SOON: (f"The rules demand a referral sooner than routine. {_DECIDE}"),
    WorkAction.REFER: f"The rules demand a routine referral. {_DECIDE}",
    WorkAction.REVIEW_IMAGE: (
        "The answer is in doubt, and not to be used before a clinician has looked at the image and at the reasons. Do so,"
        " and record your decision."
    ),
    WorkAction.DECIDE: (f"The rules demand no referral, which does not mean 'no cancer'. {_DECIDE}"),
    WorkAction.FOLLOW_UP: (
        "A clinician wanted this lesion seen again by the day that is due, and neither a later image nor an outcome has come."
        " See the patient, and send the new image under this lesion_id."
    ),
    WorkAction.REPEAT_IMAGE: (
        "This image has no answer and will have none. Judge the lesion without it, and send a new image under this"
        " lesion_id; where none can be taken, record the lesion's outcome when it is known."
    ),
    WorkAction.CHECK_LATER: (
        "The image is stored, and its assessment has not finished. Look again in a few minutes, and do not send it a second"
        " time; if it stays so, judge the lesion without it."
    ),
}

#: Said beside it where the image that demands the most has such an outcome.
_BESIDE = {
    Outcome.REVIEW: " That answer is in doubt: read its reasons first.",
    Outcome.ERASED: " The image was erased since, and its findings with it; what they demanded stays.",
}

_BY_KIND = {
    WorkKind.REVIEW: WorkAction.REVIEW_IMAGE,
    WorkKind.FOLLOW_UP: WorkAction.FOLLOW_UP,
    WorkKind.PENDING: WorkAction.CHECK_LATER,
    WorkKind.FAILED: WorkAction.REPEAT_IMAGE,
    WorkKind.REFUSED: WorkAction.REPEAT_IMAGE,
}
_BY_URGENCY = {Urgency.URGENT: WorkAction.REFER_URGENTLY, Urgency.EXPEDITED: WorkAction.REFER_SOON}


@dataclass(frozen=True, slots=True)
class RequiredAction(Shape):
    """What is to be done; `code` is stable, `message` is for people."""

    code: Annotated[WorkAction, one_of(WorkAction, "Code")]
    message: str


class WorkPlace(NamedTuple):
    """Where an item stands in the list: by its due day, then the highest level (`rank` 0), then since when it waits.

    None of it moves while the item waits unchanged, so a list read page by page has no gap and no repetition.
    """

    due: date
    rank: int
    since: datetime
    kind: WorkKind
    image_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """One thing that waits; `emergency` is the access by which alone the principal reaches the patient."""

    kind: WorkKind
    patient_id: str
    emergency: UUID | None
    lesion_id: UUID
    image_id: UUID
    assessment_id: UUID
    outcome: Outcome
    level: RiskLevel | None
    urgency: Urgency | None
    since: datetime
    due: date
    overdue: bool
    rank: int

    @property
    def emergency_access(self) -> bool:
        """Whether the patient is reached in an emergency, and by no assignment."""
        return self.emergency is not None

    @property
    def place(self) -> WorkPlace:
        """The cursor for the items behind it."""
        return WorkPlace(self.due, self.rank, self.since, self.kind, self.image_id)

    @property
    def action(self) -> RequiredAction:
        """What is to be done."""
        code = _BY_KIND.get(self.kind) or self._demanded()
        beside = _BESIDE.get(self.outcome, "") if code not in _BY_KIND.values() else ""
        return RequiredAction(code, MESSAGES[code] + beside)

    def _demanded(self) -> WorkAction:
        if self.urgency in _BY_URGENCY:
            return _BY_URGENCY[self.urgency]
        if self.level is not RiskLevel.LOW:
            return WorkAction.REFER
        return WorkAction.REVIEW_IMAGE if self.outcome is Outcome.REVIEW else WorkAction.DECIDE


class WorkItemDocument(Document):
    """One thing that waits in the caller's own care; no image is listed for two kinds but for a `follow_up`.

    `demand`: a lesion with an open demand; `level`, `urgency`, `since`, `image_id` and `assessment_id` are those of its
    `open_demand`. `review`: an image in doubt that nobody has decided on; not where its lesion's `demand` is listed by that
    image, whose `outcome` then says so. `follow_up`: a lesion that a clinician wanted to see again; `since` is when that
    was recorded, level and urgency are the clinician's. `pending`, `failed`, `refused`: an image without an answer.

    `due` is the day (UTC) by which the patient should have been seen for it: see docs/clinical.md. `emergency_access`: the
    caller reaches the patient in an emergency alone.
    """

    kind: Annotated[WorkKind, one_of(WorkKind, "Kind")]
    patient_id: str
    emergency_access: bool
    lesion_id: Id
    image_id: Id
    assessment_id: Id
    outcome: RecordedOutcome
    level: Annotated[RiskLevel, one_of(RiskLevel, "Level")] | None
    urgency: Annotated[Urgency, one_of(Urgency, "Urgency")] | None
    since: Time
    due: date
    overdue: bool
    action: RequiredAction


class WorklistDocument(Document):
    """One page, by due day, so that what is overdue comes first; of one day the highest level first."""

    items: list[WorkItemDocument]
    next: str | None


class WorklistStore(Store):
    """Reads what waits; `due_days` says how long each urgency leaves."""

    def __init__(self, pool: Pool, due_days: Mapping[str, int]) -> None:
        super().__init__(pool)
        self._days = dict(due_days) | {"notice": FOLLOW_UP_NOTICE_DAYS}

    async def worklist(
        self,
        principal: str,
        *,
        kinds: Collection[WorkKind] = tuple(WorkKind),
        limit: int,
        after: WorkPlace | None = None,
    ) -> list[WorkItem]:
        """List what waits for patients in the principal's care, by assignment or in an emergency; `after` is the last seen."""
        place = after._asdict() if after else dict.fromkeys(WorkPlace._fields)
        values = place | self._days | {"principal": principal, "kinds": list(kinds), "limit": limit}
        query, *arguments = bind(_SQL["worklist"], values)
        return await self._pool.find_all(WorkItem, query, *arguments)
