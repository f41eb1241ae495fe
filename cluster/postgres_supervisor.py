"""Keeps the embedded server running: starts it again whenever it has died."""

from __future__ import annotations

import logging
from threading import Event

from cluster.postgres import EmbeddedPostgres, PostgresFailed

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25
_BACKOFF_S = (0.25, 30.0)


def supervise(postgres: EmbeddedPostgres, stop: Event) -> None:
    """Watch the server until `stop` is set, and leave it running then.

    A start that fails (the killed server's sessions may hold its memory for a moment) is tried
    again, after 0.25 s first and 30 s at most. Blocks: give it a thread.
    """
    wait = _LOOK_EVERY_S
    while not stop.wait(wait):
        if postgres.is_running():
            wait = _LOOK_EVERY_S
            continue
        _log.warning("PostgreSQL in %s has died; starting it again", postgres.data)
        try:
            postgres.start()
        except PostgresFailed as error:
            wait = min(max(2 * wait, _BACKOFF_S[0]), _BACKOFF_S[1])
            _log.error("PostgreSQL did not start, next try in %.1f s: %s", wait, error)
