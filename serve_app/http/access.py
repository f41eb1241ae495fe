"""Who is let in: token, rate, revocation and the route's rule; whoever is not is one audit event, within bounds."""

from __future__ import annotations

import logging
from math import ceil
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute

from serve_app.access.issuer_keys import token_verifier
from serve_app.access.rate_limit import AuditBudget, TokenBuckets, sender_address
from serve_app.access.rules import Action, RequestedAction, begin, may
from serve_app.access.tokens import Principal
from serve_app.audit.events import AuditEvent
from serve_app.domain.errors import Forbidden, RateLimited, Unauthenticated
from serve_app.domain.identifiers import new_id
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.settings import Settings, split_words

_FIELD = "x-action"

#: The audit log's actor where no token says who it is, and its action where nobody got as far as one.
NOBODY = "unauthenticated"
AUTHENTICATE = "authenticate"

#: The action of a route that names none, and is denied for it.
_UNDECLARED = "undeclared"

WINDOW_S = 60.0

_log = logging.getLogger("derm.access")


def rule(action: Action, **extra: object) -> dict[str, Any]:
    """Make a route's `openapi_extra`, with its action in it."""
    return {_FIELD: action.value, **extra}


def _rule_of(request: Request) -> Action | None:
    """Find the action of the route that was chosen; None, and an error in the log, when it names none."""
    route: APIRoute = request.scope["route"]
    word = (route.openapi_extra or {}).get(_FIELD)
    if word is None:
        _log.error(
            "%s %s is denied to all: give the route openapi_extra=rule(Action...)", request.method, route.path
        )
        return None
    return Action(word)


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
        self._budgets = {
            "unauthenticated": AuditBudget(per_key=per_minute, total=total, window_s=WINDOW_S),
            "rate_limited": AuditBudget(per_key=1, total=total, window_s=WINDOW_S),
            "invalid_field": AuditBudget(per_key=per_minute, total=total, window_s=WINDOW_S),
        }

    async def admit(self, request: Request) -> Principal:
        """Say who asks. Raises Unauthenticated, RateLimited, or Forbidden where no role of theirs grants the action."""
        begin(None)
        try:
            principal = await self._verifier.identify(_token(request))
        except Unauthenticated:
            await self._refuse_stranger(request)
        action = _rule_of(request)
        requested = RequestedAction(principal, action or _UNDECLARED, request.scope["request_id"])
        begin(requested)
        request.state.requested = requested
        if wait := self._principals.take(principal.subject):
            if self._budgets["rate_limited"].spend(principal.subject):
                await self._records.record_event(requested.event("denied", reason="rate_limited"))
            requested.recorded = True
            raise RateLimited(retry_after_s=ceil(wait))
        if await self._access.is_revoked(principal):
            await self._records.record_event(requested.event("denied", reason="revoked"))
            raise Unauthenticated
        reason = may(principal, action).reason if action is not None else "no_rule"
        if reason in {"role", "no_rule"}:
            await self._records.record_event(requested.event("denied", reason=reason))
            raise Forbidden
        return principal

    async def record_invalid(self, requested: RequestedAction) -> None:
        """Record a request whose parameters say nothing, within bounds."""
        if self._budgets["invalid_field"].spend(requested.principal.subject):
            await self._records.record_event(requested.event("failed", code="invalid_field"))

    async def _refuse_stranger(self, request: Request) -> NoReturn:
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
            event = _nobodys_event(request.scope["request_id"], code="unauthenticated", client=address)
            await self._records.record_event(event)
        raise Unauthenticated

    async def summarise(self) -> None:
        """Write one event for each kind that had more than may be written singly."""
        for code, budget in self._budgets.items():
            if count := budget.drain():
                await self._records.record_event(_nobodys_event(str(new_id()), code=code, not_listed=count))


def _nobodys_event(request_id: str, **detail: object) -> AuditEvent:
    return AuditEvent(
        action=AUTHENTICATE, actor=NOBODY, outcome="denied", request_id=request_id, detail=detail
    )


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated
    return token.strip()
