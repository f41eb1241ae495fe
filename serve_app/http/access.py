"""Who is let in, and to whose record: token, rate, revocation, the route's rule, and whether the patient is theirs.

Whoever is not is one audit event, within bounds.
"""

from __future__ import annotations

from collections import Counter
import logging
from math import ceil
import re
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from uuid import UUID

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from serve_app.access.rate_limit import AuditBudget, TokenBuckets, is_from_loopback, sender_address
from serve_app.access.rules import Action, Principal, RequestedAction, begin, may
from serve_app.access.tokens import token_verifier
from serve_app.audit.events import NOBODY, AuditEvent
from serve_app.domain.errors import Forbidden, NotFound, RateLimited, Unauthenticated
from serve_app.domain.identifiers import new_id
from serve_app.records.access import AccessStore
from serve_app.records.lesion_rows import PatientAccess
from serve_app.records.lesions import LesionStore
from serve_app.settings import Settings, split_words

if TYPE_CHECKING:  # they hold the Authenticator
    from serve_app.http.services import Services

_FIELD = "x-action"

#: The action of a route that names none, and is denied for it.
_UNDECLARED = "undeclared"

#: For the document alone: what counts as a bearer token is for the Authenticator to say.
_DOCUMENTED = HTTPBearer(scheme_name="bearer", bearerFormat="JWT", auto_error=False)
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_log = logging.getLogger("derm.access")


def rule(action: Action, **extra: object) -> dict[str, Any]:
    """Make a route's `openapi_extra`, with its action in it."""
    return {_FIELD: action.value, **extra}


def _rule_of(request: Request) -> Action | None:
    """Find the action of the route that was chosen; None, and an error in the log, when it names none."""
    route: APIRoute = request.scope["route"]
    if word := (route.openapi_extra or {}).get(_FIELD):
        return Action(word)
    _log.error("%s %s is denied to all: it has no openapi_extra=rule(Action...)", request.method, route.path)
    return None


class Authenticator:
    """Lets a request in as somebody's, or refuses it; what it counts is one process's own."""

    def __init__(self, settings: Settings, access: AccessStore, records: LesionStore) -> None:
        self._verifier = token_verifier(settings)
        self._access = access
        self._records = records
        self._trusted_proxies = frozenset(split_words(settings.trusted_proxies))
        self._principals = TokenBuckets(rate_per_s=settings.rate_limit_per_s, burst=settings.rate_limit_burst)
        per_minute, total = settings.unauthenticated_per_minute, settings.refusal_events_per_minute
        self._strangers = TokenBuckets(rate_per_s=per_minute / 60, burst=per_minute)
        #: By code: how many events may be written singly.
        singly = {"unauthenticated": per_minute, "rate_limited": 1, "invalid_field": per_minute}
        self._budgets = {code: AuditBudget(per_key=key, total=total) for code, key in singly.items()}

    async def admit(self, request: Request, action: Action | None = None) -> RequestedAction:
        """Say who asks for what; `action` where the route is anyone's, and has none.

        Raises Unauthenticated, RateLimited, or Forbidden where no role of theirs grants the action.
        """
        begin(None)
        try:
            principal = await self._verifier.identify(bearer_token(request))
        except Unauthenticated as refusal:
            await self.refuse_stranger(request, refusal)
        action = action or _rule_of(request)
        requested = await self.let_ask(request, principal, action or _UNDECLARED)
        if await self._access.is_revoked(principal):
            await self._records.record_event(requested.event("denied", reason="revoked"))
            raise Unauthenticated
        reason = may(principal, action).reason if action is not None else "no_rule"
        if reason in {"role", "no_rule"}:
            await self._records.record_event(requested.event("denied", reason=reason))
            raise Forbidden
        return requested

    async def let_ask(self, request: Request, principal: Principal, action: str) -> RequestedAction:
        """Begin a request of somebody who is known; RateLimited, and recorded within bounds, when they ask too often."""
        requested = RequestedAction(principal, action, request.scope["request_id"])
        begin(requested)
        request.state.requested = requested
        if wait := self._principals.take(principal.subject):
            if self._budgets["rate_limited"].spend(principal.subject):
                await self._records.record_event(requested.event("denied", reason="rate_limited"))
            requested.recorded = True
            raise RateLimited(retry_after_s=ceil(wait))
        return requested

    async def record_invalid(self, requested: RequestedAction) -> None:
        """Record a request whose parameters say nothing, within bounds."""
        if self._budgets["invalid_field"].spend(requested.principal.subject):
            await self._records.record_event(requested.event("failed", code="invalid_field"))

    async def refuse_stranger(self, request: Request, refusal: Unauthenticated) -> NoReturn:
        """Refuse whoever has no valid token: 401 and its event, or past the address's bound 429 and a count."""
        address = sender_address(
            request.client.host if request.client else "",
            request.headers.getlist("x-forwarded-for"),
            self._trusted_proxies,
        )
        budget = self._budgets["unauthenticated"]
        if wait := self._strangers.take(address):
            budget.suppress()
            raise RateLimited(retry_after_s=ceil(wait))
        if budget.spend(address):
            event = _nobodys_event(request.scope["request_id"], code=refusal.code, client=address)
            await self._records.record_event(event)
        raise refusal

    async def summarise(self) -> None:
        """Write one event for each kind that had more than may be written singly."""
        for code, budget in self._budgets.items():
            if count := budget.drain():
                await self._records.record_event(_nobodys_event(str(new_id()), code=code, not_listed=count))


def _nobodys_event(request_id: str, **detail: object) -> AuditEvent:
    return AuditEvent(
        action="authenticate", actor=NOBODY, outcome="denied", request_id=request_id, detail=detail
    )


def bearer_token(request: Request) -> str:
    """The token that a request comes with; Unauthenticated without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated
    return token.strip()


def is_this_machines(request: Request) -> bool:
    """Whether a request was made on this machine, and came through no proxy that names another as its sender."""
    peer = request.client.host if request.client else ""
    forwarded = request.headers.getlist("x-forwarded-for")
    return "forwarded" not in request.headers and is_from_loopback(peer, forwarded)


async def authenticate(request: Request, _: Annotated[object, Depends(_DOCUMENTED)]) -> RequestedAction:
    """Verify `Authorization: Bearer <JWT>`, and that the route is for this principal at all.

    Raises Unauthenticated, RateLimited or Forbidden; each is in the audit log. RequestValidationError for a body or a
    query parameter that the route does not have, or takes once and was sent twice: none is ever ignored.
    """
    services: Services = request.app.state.services
    requested = await services.authenticator.admit(request)
    sends_body = "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"
    if sends_body or request.query_params:
        _judge(request, sends_body=sends_body)
    return requested


def _judge(request: Request, *, sends_body: bool) -> None:
    operation = (
        request.app.openapi()["paths"].get(request.scope["route"].path, {}).get(request.method.lower(), {})
    )
    if sends_body and "requestBody" not in operation:
        raise RequestValidationError([{"loc": ("body",), "msg": "this route takes none"}])
    known = {
        found["name"]: found["schema"] for found in operation.get("parameters", []) if found["in"] == "query"
    }
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known:
            # Named only where it is a word: it may be anything that a caller knows.
            word = f" {name}" if _WORD.fullmatch(name) else ""
            takes = ", ".join(known) or "none"
            fault = {"loc": ("query",), "msg": f"no such parameter{word}; this route takes {takes}"}
            raise RequestValidationError([fault])
        kinds = known[name].get("anyOf", [known[name]])
        if times > 1 and not any(kind.get("type") == "array" for kind in kinds):
            raise RequestValidationError([{"loc": ("query", name), "msg": "sent twice"}])


#: Who asks, and for what.
Caller = Annotated[RequestedAction, Depends(authenticate)]


async def permit(
    services: Services, requested: RequestedAction, access: PatientAccess, patient_id: str | None
) -> None:
    """Permit a request for a patient, or record the denial and raise Forbidden.

    The caller reads the same words whether the patient is another's or does not exist. What rests on an emergency
    access is marked so in all events of the request.
    """
    action = Action(requested.action)
    decision = may(requested.principal, action, assigned=access.assigned, emergency=access.emergency)
    requested.patient_id, requested.emergency = patient_id, decision.emergency
    if not decision:
        await services.records.record_event(requested.event("denied", reason=decision.reason))
        raise Forbidden


async def permit_lesion(services: Services, requested: RequestedAction, lesion_id: UUID) -> None:
    """Permit a request for a lesion by its patient, as `permit` does.

    An unknown lesion is denied like a stranger's: Forbidden, and on record. Only who may do this
    for any patient learns that it is unknown: NotFound.
    """
    access = await services.records.access(requested.actor, None, lesion_id)
    requested.lesion_id = lesion_id
    await permit(services, requested, access, access.lesion_patient)
    if access.lesion_patient is None:
        raise NotFound
