"""What a clinician says: of an answer, before and after seeing it, what the lesion turned out to be, and which lesions are one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
import json
import re
from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serve_app.access.rules import Action, RequestedAction
from serve_app.domain.assessment import OpenDemand, RiskLevel, Urgency, one_of
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.errors import InvalidField
from serve_app.domain.review import (
    Decision,
    LesionLink,
    LesionOutcome,
    LinkReason,
    OutcomeKind,
    OutcomeSource,
    OverrideReason,
    Referral,
)
from serve_app.fhir.codes import OWN
from serve_app.http.access import Caller, permit_lesion, rule
from serve_app.http.bodies import TEXT, Form, body_of, check_idempotency_key, read_form
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES
from serve_app.http.services import Parts, Services
from serve_app.http.similar import ReferenceDiagnosis
from serve_app.records.answers import LinkedDocument, ReviewedDocument, lesion_url
from serve_app.records.reviews import Statement

router = APIRouter(tags=["reviews"], responses=PROBLEM_RESPONSES)

#: A day begins somewhere on earth this long before it does in UTC, and ends somewhere this long after.
_AHEAD, _BEHIND = timedelta(hours=14), timedelta(hours=12)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
#: A wrong century would keep a follow-up from ever being due.
_YEARS_TO_COME, _FIRST_YEAR = 10, 1900
#: Of codes by which a report says what the service says; compared in small letters, as URNs are (RFC 8141).
_OWN_SYSTEMS = f"{OWN}:"


def _day(value: object) -> date:
    """Read a day, and nothing else that could be taken for one (a number of seconds, a moment, a week)."""
    if isinstance(value, str) and _DAY.fullmatch(value):
        with suppress(ValueError):
            return date.fromisoformat(value)
    raise PydanticCustomError("day", "a day is required, YYYY-MM-DD")


def _to_come(value: date) -> date:
    today = (datetime.now(UTC) - _BEHIND).date()
    if value < today:
        raise PydanticCustomError("day", "this day has passed")
    if value.year > today.year + _YEARS_TO_COME:
        raise PydanticCustomError("day", "this day is more than ten years away")
    return value


def _come(value: date) -> date:
    if value > (datetime.now(UTC) + _AHEAD).date():
        raise PydanticCustomError("day", "this day is yet to come")
    if value.year < _FIRST_YEAR:
        raise PydanticCustomError("day", "this day is before 1900")
    return value


_Day = Annotated[date, BeforeValidator(_day), WithJsonSchema({"type": "string", "format": "date"})]
_AnyDiagnosis = Annotated[Diagnosis, one_of(Diagnosis, "Diagnosis")]


class ImpressionForm(Form):
    """What the clinician thinks of the lesion, and whether they would refer."""

    diagnosis: _AnyDiagnosis | None = None
    intended_referral: Annotated[Referral, one_of(Referral, "Referral")] | None = None


class LesionReviewForm(Form):
    """Of which assessment, and what: a decision, an impression, or both.

    An accepted answer is taken as it is; an override has a reason and at least one of diagnosis, level and urgency.
    `note`: for whoever reads the timeline; it goes with the image when that is erased.
    """

    assessment_id: UUID
    decision: Annotated[Decision, one_of(Decision, "Decision")] | None = None
    reason: Annotated[OverrideReason, one_of(OverrideReason, "Reason")] | None = None
    diagnosis: _AnyDiagnosis | None = None
    level: Annotated[RiskLevel, one_of(RiskLevel, "Level")] | None = None
    urgency: Annotated[Urgency, one_of(Urgency, "Urgency")] | None = None
    referral_made: StrictBool | None = None
    follow_up_by: Annotated[_Day, AfterValidator(_to_come)] | None = None
    note: str | None = Field(default=None, min_length=1, max_length=1000, pattern=TEXT)
    impression: ImpressionForm | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        own = {"diagnosis": self.diagnosis, "level": self.level, "urgency": self.urgency}
        beside = {"referral_made": self.referral_made, "follow_up_by": self.follow_up_by, "note": self.note}
        said = [name for name, value in {"reason": self.reason, **own}.items() if value is not None]
        if self.decision is None:
            said += [name for name, value in beside.items() if value is not None]
            if said:
                raise InvalidField(f"decision: required with {', '.join(said)}.")
            if self.impression is None:
                raise InvalidField("decision: required, or an impression.")
        elif self.decision is Decision.ACCEPT and said:
            raise InvalidField(f"decision: an accepted answer is taken as it is, without {', '.join(said)}.")
        elif self.decision is Decision.OVERRIDE and (self.reason is None or said == ["reason"]):
            raise InvalidField("decision: an override needs a reason and a diagnosis, level or urgency.")
        if self.impression is not None and self.impression == ImpressionForm():
            raise InvalidField("impression: diagnosis or intended_referral is required.")
        return self


class LesionOutcomeForm(Form):
    """What the lesion turned out to be: a diagnosis, or where none of them fits whether it is malignant.

    `malignant` follows from the diagnosis (AK counts as malignant, as it does in the risk). `code` is the source's own, in
    `code_system`, a URI. `observed_on`: the day of the specimen or the visit.
    """

    kind: Annotated[OutcomeKind, one_of(OutcomeKind, "Kind")]
    diagnosis: ReferenceDiagnosis | None = None
    malignant: StrictBool | None = None
    code: str | None = Field(default=None, pattern=r"^[!-~]{1,100}$")
    code_system: str | None = Field(default=None, max_length=200, pattern=r"^[A-Za-z][A-Za-z0-9+.-]*:[!-~]+$")
    observed_on: Annotated[_Day, AfterValidator(_come)]
    source: Annotated[OutcomeSource, one_of(OutcomeSource, "Source")]
    image_id: UUID | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.diagnosis is not None:
            follows = Diagnosis(self.diagnosis) in MALIGNANT
            if self.malignant not in {None, follows}:
                raise InvalidField(
                    f"malignant: {self.diagnosis} is {'' if follows else 'not '}malignant here."
                )
            self.malignant = follows
        elif self.malignant is None:
            raise InvalidField("diagnosis: required, or malignant.")
        if (self.code is None) != (self.code_system is None):
            raise InvalidField("code, code_system: both or neither.")
        if (self.code_system or "").lower().startswith(_OWN_SYSTEMS):
            raise InvalidField("code_system: one of this service's own; a diagnosis of it goes in diagnosis.")
        return self


_OUTCOME = TypeAdapter(LesionOutcome)


@router.post(
    "/api/lesions/{lesion_id}/reviews",
    status_code=201,
    response_model=ReviewedDocument,
    openapi_extra=rule(Action.REVIEW, requestBody=body_of(LesionReviewForm)),
    summary="Say what you make of an answer",
)
async def review_assessment(
    request: Request,
    requested: Caller,
    services: Parts,
    lesion_id: UUID,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Record a clinician's impression or decision; the answer stays as it is.

    A decision answers what its assessment demands, and what older images of the lesion demand that is no higher in level
    or in urgency; whatever demands more, or came later, stays open. An impression that comes before its clinician was
    given the answer says so (`before_answer`), by the service's own clock and log.
    """
    await permit_lesion(services, requested, lesion_id)
    form = await read_form(request, LesionReviewForm)
    requested.assessment_id = form.assessment_id
    impression = form.impression or ImpressionForm()
    said = form.model_dump(mode="json", exclude={"impression"}) | {
        "impression_diagnosis": impression.diagnosis,
        "intended_referral": impression.intended_referral,
    }
    detail = {} if form.decision is None else {"decision": form.decision}
    statement = _statement(services, requested, lesion_id, form, said, idempotency_key, detail)
    review, open_demand, is_new = await services.reviews.review(statement)
    if not is_new:
        requested.image_id = review.image_id
        await _look_again(services, requested)
    document = ReviewedDocument(review=review, open_demand=open_demand)
    return JSONResponse(document.answer(), 201, NO_STORE | {"Location": lesion_url(lesion_id)})


@router.post(
    "/api/lesions/{lesion_id}/outcomes",
    status_code=201,
    response_model=LesionOutcome,
    openapi_extra=rule(Action.RECORD_OUTCOME, requestBody=body_of(LesionOutcomeForm)),
    summary="Say what a lesion turned out to be",
)
async def record_outcome(
    request: Request,
    requested: Caller,
    services: Parts,
    lesion_id: UUID,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Record histology or a follow-up; it adds to what was recorded before, and closes no demand."""
    await permit_lesion(services, requested, lesion_id)
    form = await read_form(request, LesionOutcomeForm)
    requested.image_id = form.image_id
    said = form.model_dump(mode="json")
    statement = _statement(services, requested, lesion_id, form, said, idempotency_key, {"kind": form.kind})
    outcome, is_new = await services.reviews.record_outcome(statement)
    if not is_new:
        await _look_again(services, requested)
    headers = NO_STORE | {"Location": lesion_url(lesion_id)}
    return JSONResponse(_OUTCOME.dump_python(outcome, mode="json"), 201, headers)


_LinkReason = Annotated[LinkReason, one_of(LinkReason, "LinkReason")]


class UnlinkForm(Form):
    """Why the lesion is not the same as the one that it is linked to."""

    reason: _LinkReason


class LinkForm(Form):
    """Which earlier lesion of the patient this one is, and how that is known."""

    earlier_lesion_id: UUID
    reason: _LinkReason


@router.post(
    "/api/lesions/{lesion_id}/link",
    status_code=201,
    response_model=LinkedDocument,
    openapi_extra=rule(Action.LINK, requestBody=body_of(LinkForm)),
    summary="Say that a lesion is the same as an earlier one",
)
async def link_lesion(
    request: Request,
    requested: Caller,
    services: Parts,
    lesion_id: UUID,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Have two lesions of a patient shown as one; nothing is moved, no answer changes, and no demand is lowered or closed by it."""
    await permit_lesion(services, requested, lesion_id)
    form = await read_form(request, LinkForm)
    link = services.reviews.link
    return await _say_of_link(services, requested, lesion_id, form, idempotency_key, link, 201)


@router.post(
    "/api/lesions/{lesion_id}/unlink",
    response_model=LinkedDocument,
    openapi_extra=rule(Action.UNLINK, requestBody=body_of(UnlinkForm)),
    summary="End a lesion's link to an earlier one",
)
async def unlink_lesion(
    request: Request,
    requested: Caller,
    services: Parts,
    lesion_id: UUID,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Have a lesion shown by itself again, as it was; what was open for both is open for each until a clinician decides on it."""
    await permit_lesion(services, requested, lesion_id)
    form = await read_form(request, UnlinkForm)
    unlink = services.reviews.unlink
    return await _say_of_link(services, requested, lesion_id, form, idempotency_key, unlink, 200)


async def _say_of_link(
    services: Services,
    requested: RequestedAction,
    lesion_id: UUID,
    form: LinkForm | UnlinkForm,
    key: str | None,
    say: Callable[[Statement], Awaitable[tuple[LesionLink, OpenDemand | None, bool]]],
    status: int,
) -> JSONResponse:
    said = form.model_dump(mode="json")
    statement = _statement(services, requested, lesion_id, form, said, key, {"reason": form.reason})
    link, open_demand, is_new = await say(statement)
    if not is_new:
        await _look_again(services, requested)
    document = LinkedDocument(link=link, open_demand=open_demand)
    return JSONResponse(document.answer(), status, NO_STORE | {"Location": lesion_url(lesion_id)})


def _statement(
    services: Services,
    requested: RequestedAction,
    lesion_id: UUID,
    form: Form,
    said: dict[str, object],
    key: str | None,
    detail: Mapping[str, str],
) -> Statement:
    check_idempotency_key(key)
    sent = json.dumps([requested.action, str(lesion_id), form.model_dump(mode="json")])
    return Statement(
        lesion_id=lesion_id,
        said=said,
        event=requested.event("success", **detail),
        tells_pms=services.tells_pms,
        tells_fhir=services.tells_fhir,
        key=key,
        request_sha256=None if key is None else sha256(sent.encode()).digest(),
    )


async def _look_again(services: Services, requested: RequestedAction) -> None:
    """Have a repeated request on record: it adds nothing, and is a look at what it led to."""
    looked = replace(requested, action=Action.READ)
    await services.records.record_event(looked.event("success", repeated=requested.action))
