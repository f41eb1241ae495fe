"""CDS Hooks 2.0: discovery, the cards of a patient who is being looked at, and what became of them.

These routes are described by the specification and by discovery, and are not in the OpenAPI document: another protocol,
with tokens of its own. Errors are 4xx as it allows, each a problem document. There are no CORS headers: an EHR calls
from its server, where its private key is.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from serve_app.access.rules import begin
from serve_app.domain.errors import InvalidField, InvalidHookRequest, NotFound, TokenReplayed, Unauthenticated
from serve_app.domain.identifiers import is_fhir_id, is_fhir_user
from serve_app.domain.review import OverrideReason
from serve_app.hooks.cards import REASONS
from serve_app.hooks.clients import Caller
from serve_app.hooks.service import (
    FEEDBACK_PATH,
    SERVICE,
    SERVICE_ID,
    SERVICE_PATH,
    HookService,
    principal_of,
)
from serve_app.http.access import bearer_token
from serve_app.http.bodies import TEXT, AnyForm, read_form
from serve_app.http.documents import NO_STORE
from serve_app.http.services import Parts, Services
from serve_app.logs import conceal
from serve_app.records.hooks import GivenFeedback

router = APIRouter(tags=["cds-hooks"], include_in_schema=False)

#: Of a body: an access token and prefetched resources that nobody asked for may be in it, and are not looked at.
MAX_BYTES = 64 * 1024
MAX_FEEDBACK = 100
_YEARS = 2000, 2100


def _of_fhir(holds: Callable[[str], bool]) -> AfterValidator:
    def check(value: str) -> str:
        if not holds(value):
            raise ValueError("no id of FHIR")
        return value

    return AfterValidator(check)


class _Loose(BaseModel):
    """What others may extend: unknown fields are passed over, as the specification has it."""

    model_config = ConfigDict(extra="ignore")


class _Context(_Loose):
    user: Annotated[str, Field(alias="userId"), _of_fhir(is_fhir_user)]
    patient: Annotated[str, Field(alias="patientId"), _of_fhir(is_fhir_id)]


class _Call(_Loose):
    hook: Literal["patient-view"]
    hook_instance: UUID = Field(alias="hookInstance")
    context: _Context


class _Coding(_Loose):
    system: str | None = Field(default=None, min_length=1, max_length=200, pattern=TEXT)
    code: str = Field(min_length=1, max_length=100, pattern=TEXT)


class _OverrideReason(_Loose):
    reason: _Coding | None = None
    comment: str | None = Field(
        default=None, alias="userComment", min_length=1, max_length=4000, pattern=TEXT
    )


def _in_our_time(moment: datetime) -> datetime:
    """Take no moment of years for which PostgreSQL or Python has no time in every zone: no clock of an EHR is there."""
    if not _YEARS[0] <= moment.year < _YEARS[1]:
        raise ValueError("no time of this century")
    return moment


class _Feedback(_Loose):
    card: UUID
    outcome: Literal["accepted", "overridden"]
    override: _OverrideReason = Field(default=_OverrideReason(), alias="overrideReason")
    at: Annotated[AwareDatetime, AfterValidator(_in_our_time)] = Field(alias="outcomeTimestamp")


class _Told(_Loose):
    feedback: list[_Feedback] = Field(min_length=1, max_length=MAX_FEEDBACK)


@router.get("/cds-services")
async def discover(services: Parts) -> JSONResponse:
    """Say which services there are, to anyone: none where no EHR is configured."""
    return JSONResponse({"services": [SERVICE] if services.hooks else []})


@router.post("/cds-services/{service_id}")
async def call(request: Request, services: Parts, service_id: str) -> JSONResponse:
    """Answer the hook with the cards of a patient; with none for whoever may not read of that patient."""
    hooks = _hooks(services, service_id)
    caller = await _admit(request, services, hooks, SERVICE_PATH, "read")
    sent = await _read(request, _Call)
    conceal(sent.context.user, sent.context.patient)
    cards = await hooks.cards(
        caller,
        request.state.requested,
        user=sent.context.user,
        patient=sent.context.patient,
        hook_instance=str(sent.hook_instance),
    )
    return JSONResponse({"cards": cards}, headers=NO_STORE)


@router.post("/cds-services/{service_id}/feedback")
async def hear(request: Request, services: Parts, service_id: str) -> Response:
    """Record what became of cards: it is no review, and closes no demand."""
    hooks = _hooks(services, service_id)
    caller = await _admit(request, services, hooks, FEEDBACK_PATH, "hook_feedback")
    sent = await _read(request, _Told)
    await hooks.hear(caller, request.state.requested, [_given(each) for each in sent.feedback])
    return Response(headers=NO_STORE)


def _hooks(services: Services, service_id: str) -> HookService:
    if services.hooks is None or service_id != SERVICE_ID:
        raise NotFound("There is no such CDS service here.")
    return services.hooks


async def _admit(request: Request, services: Services, hooks: HookService, path: str, action: str) -> Caller:
    """Let an EHR in with a token that was not taken before; Unauthenticated or RateLimited, and on record, as elsewhere."""
    authenticator = services.authenticator
    try:
        caller = await hooks.clients.identify(bearer_token(request), path)
        await authenticator.let_ask(request, principal_of(caller.name), action)
        if not await hooks.take(caller):
            raise TokenReplayed
    except Unauthenticated as refusal:
        request.state.requested = None  # of nobody, as far as the log is concerned
        begin(None)
        await authenticator.refuse_stranger(request, refusal)
    return caller


async def _read(request: Request, form: type[AnyForm]) -> AnyForm:
    try:
        return await read_form(request, form, limit=MAX_BYTES)
    except InvalidField as error:
        raise InvalidHookRequest(str(error)) from None


def _given(told: _Feedback) -> GivenFeedback:
    reason, comment = told.override.reason, told.override.comment
    conceal(comment)
    if reason is not None and reason.system == REASONS and reason.code not in set(OverrideReason):
        raise InvalidHookRequest("feedback.overrideReason.reason.code: none of the reasons of this service.")
    system, code = (reason.system, reason.code) if reason else (None, None)
    return GivenFeedback(told.card, told.outcome, told.at, system, code, comment)
