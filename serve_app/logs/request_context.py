"""What the log must know of the request at hand: its id, and what its caller sent.

A context variable that holds something mutable: what a route adds is seen by everything the request
started, threads of `asyncio.to_thread` included.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

#: Shorter values are numbers, sexes and sites; replacing them would tear every other word apart.
_SHORTEST = 4


@dataclass(slots=True)
class RequestContext:
    """One request: the id on its log lines, and the caller's own words, which are on none."""

    request_id: str
    concealed: set[str] = field(default_factory=set)


_current: ContextVar[RequestContext | None] = ContextVar("derm_request", default=None)


def begin_request(request_id: str, concealed: Iterable[str] = ()) -> None:
    """Have the log know of a request, in this task and all that it starts."""
    _current.set(RequestContext(request_id))
    conceal(*concealed)


def end_request() -> None:
    """Have the log forget it."""
    _current.set(None)


def conceal(*values: str | None) -> None:
    """Keep what a caller sent (ids, file names, tokens) out of every log line of the request at hand."""
    request = _current.get()
    if request is not None:
        request.concealed.update(value for value in values if value and len(value) >= _SHORTEST)


def current_request() -> RequestContext | None:
    """The request that this task or thread works for, if any."""
    return _current.get()
