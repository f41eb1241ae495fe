"""Who is let in: the sender's address, each route's rule, token, rate and revocation."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
import logging
from math import ceil
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute

from serve_app.access.issuer_keys import Freshness, IssuerKeys, PublicKeyVerifier
from serve_app.access.rate_limit import AuditBudget, TokenBuckets
from serve_app.access.rules import Action, RequestedAction, begin, may
from serve_app.access.tokens import Principal, TokenVerifier, Verifier
from serve_app.audit.events import AuditEvent
from serve_app.domain.errors import Forbidden, RateLimited, Unauthenticated
from serve_app.domain.identifiers import new_id
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.settings import Settings

UNKNOWN = "unknown"
#: One subscriber has at least this much of IPv6 to choose addresses from (RFC 6177).
_IPV6_PREFIX = 64


def client_address(request: Request, trusted_proxies: Collection[str] = ()) -> str:
    """Name the sender's address (IPv6: its /64 network), as far as it can be believed.

    X-Forwarded-For is read from its right end, through `trusted_proxies` and no further: what
    stands left of them, the sender may have made up.
    """
    here = _parse(request.client.host if request.client else "")
    hops = [hop.strip() for line in request.headers.getlist("x-forwarded-for") for hop in line.split(",")]
    while here is not None and str(here) in trusted_proxies and hops:
        before = _parse(hops.pop())
        if before is None:
            break
        here = before
    if here is None:
        return UNKNOWN
    if isinstance(here, IPv6Address):
        return str(ip_network((here, _IPV6_PREFIX), strict=False))
    return str(here)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


_FIELD = "x-action"

_log = logging.getLogger("derm.access")


def rule(action: Action, **extra: object) -> dict[str, Any]:
    """Make a route's `openapi_extra`, with its action in it."""
    return {_FIELD: action.value, **extra}


def rule_of(request: Request) -> Action | None:
    """Find the action of the route that was chosen; None, and an error in the log, when it names none."""
    route = request.scope.get("route")
    word = (route.openapi_extra or {}).get(_FIELD) if isinstance(route, APIRoute) else None
    if word is None:
        path = route.path if isinstance(route, APIRoute) else "?"
        _log.error(
            "%s %s is denied to all: give the route openapi_extra=rule(Action...)", request.method, path
        )
        return None
    return Action(word)


#: The audit log's actor where no token says who it is, and its action where nobody got as far as one.
NOBODY = "unauthenticated"
AUTHENTICATE = "authenticate"

#: The action of a route that names none, and is denied for it.
_UNDECLARED = "undeclared"

WINDOW_S = 60.0


class Authenticator:
    """Lets a request in as somebody, or turns it away; each of these is one audit event, within bounds."""

    def __init__(self, settings: Settings, access: AccessStore, records: LesionStore) -> None:
        self._verifier = token_verifier(settings)
        self._access = access
        self._records = records
        self._trusted = frozenset(words(settings.trusted_proxies))
        self._principals = TokenBuckets(rate_per_s=settings.rate_limit_per_s, burst=settings.rate_limit_burst)
        # An address may fail so often to show a token; of all refusals so many are events of their own.
        per_minute, total = settings.unauthenticated_per_minute, settings.refusal_events_per_minute
        self._strangers = TokenBuckets(rate_per_s=per_minute / 60, burst=per_minute)
        self._limited = AuditBudget(per_key=1, total=total, window_s=WINDOW_S)
        self._refused = AuditBudget(per_key=per_minute, total=total, window_s=WINDOW_S)
        self._faulty = AuditBudget(per_key=per_minute, total=total, window_s=WINDOW_S)

    async def admit(self, request: Request) -> Principal:
        """Say who asks. Raises Unauthenticated, RateLimited, or Forbidden where no role of theirs grants the action."""
        begin(None)
        try:
            principal = await self._verifier.identify(_token(request))
        except Unauthenticated:
            await self._turn_away(request)
        action = rule_of(request)
        attempt = RequestedAction(principal, action or _UNDECLARED, request.scope["request_id"])
        begin(attempt)
        request.state.attempt = attempt
        if wait := self._principals.take(principal.subject):
            if self._limited.spend(principal.subject):
                await self._records.record_event(attempt.event("denied", reason="rate_limited"))
            attempt.recorded = True
            raise RateLimited(retry_after_s=ceil(wait))
        if await self._access.is_revoked(principal):
            await self._records.record_event(attempt.event("denied", reason="revoked"))
            raise Unauthenticated
        decision = may(principal, action) if action is not None else None
        if decision is None or decision.reason == "role":
            reason = "no_rule" if decision is None else decision.reason
            await self._records.record_event(attempt.event("denied", reason=reason))
            raise Forbidden
        return principal

    async def record_fault(self, attempt: RequestedAction, code: str) -> None:
        """Record a request that was no question at all, within bounds."""
        if self._faulty.spend(attempt.principal.subject):
            await self._records.record_event(attempt.event("failed", code=code))

    async def _turn_away(self, request: Request) -> NoReturn:
        """Refuse whoever has no valid token: 401 and its event, or past the address's bound 429 and a count."""
        address = client_address(request, self._trusted)
        wait = self._strangers.take(address)
        if wait:
            self._refused.suppress()
            raise RateLimited(retry_after_s=ceil(wait))
        if self._refused.spend(address):
            await self._records.record_event(
                _nobodys_event(request.scope["request_id"], code="unauthenticated", client=address)
            )
        raise Unauthenticated

    async def summarise(self) -> None:
        """Write one event for each kind that had more than may be written singly."""
        for code, budget in (
            ("unauthenticated", self._refused),
            ("rate_limited", self._limited),
            ("invalid_field", self._faulty),
        ):
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


def token_verifier(settings: Settings) -> Verifier:
    """Check tokens by the issuer's published keys where they are configured, else by the shared secret."""
    if settings.token_jwks:
        return PublicKeyVerifier(
            IssuerKeys(settings.token_jwks, freshness=Freshness(refresh_s=settings.token_jwks_refresh_s)),
            settings.token_issuer,
            settings.token_audience,
            words(settings.token_algorithms),
        )
    return TokenVerifier(
        settings.token_secret.get_secret_value(), settings.token_issuer, settings.token_audience
    )


def words(text: str) -> tuple[str, ...]:
    """Split a setting of several words at its commas."""
    return tuple(word for part in text.split(",") if (word := part.strip()))
