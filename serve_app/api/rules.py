"""Which action each route is: said at the route, published as `x-action`, and denied where it is not said."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute

from serve_app.security.access import Action

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
