"""Every background loop of an ingress replica, in one supervised task group: none ends unnoticed.

Every replica runs all of them (http/services.py lists them). What keeps two replicas from doing one thing twice is
each loop's own: a lease on a row, an advisory lock, or work that is safe to repeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
import contextlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
import logging
import random
from time import monotonic
from typing import Any

from serve_app.audit.checkpoints import Checkpoint, CheckpointLog
from serve_app.domain.assessment import format_time
from serve_app.domain.errors import DermError, IntegrityError
from serve_app.records.audit_log import AuditChain, describe_overdue, sign_head
from serve_app.records.health import Violation, find_violations
from serve_app.records.pool import Pool

#: Seconds before a loop that ended is started again: doubled each time, until one has run for STEADY_S. Well below
#: SEALED_WITHIN: who cannot sign goes on sealing, and no sound event is taken for one that was slipped in.
FIRST_PAUSE_S, LONGEST_PAUSE_S, STEADY_S = 1.0, 60.0, 300.0
#: A loop that ended so often in a row is a finding.
KEEPS_ENDING_AFTER = 3
#: How long one piece of a round may take: each can be broken off anywhere, and its next round goes on from there.
WITHIN_S = 600.0
#: How long a shutdown waits for all loops, and each loop for its last act.
STOP_WITHIN_S, LAST_WITHIN_S = 10.0, 3.0

_log = logging.getLogger("derm.worker")

Loop = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class _State:
    running: bool = False
    restarts: int = 0
    in_a_row: int = 0
    last_error: str | None = None


class Worker:
    """Runs loops that are meant to run for ever; one that returns or raises is logged and started again."""

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}

    @asynccontextmanager
    async def running(self, loops: Mapping[str, Loop]) -> AsyncIterator[None]:
        """Run these loops meanwhile; then cancel them, and wait for STOP_WITHIN_S at most."""
        self._states = {name: _State() for name in loops}
        group = asyncio.create_task(self._run(loops))
        try:
            yield
        finally:
            group.cancel()
            await asyncio.wait({group}, timeout=STOP_WITHIN_S)
            if left := [name for name, state in self._states.items() if state.running]:
                _log.error("Not stopped in time: %s", ", ".join(left))

    def describe(self) -> dict[str, dict[str, Any]]:
        """For /readyz, by loop: whether it runs, how often it was started again, and what ended it last."""
        shown = ("running", "restarts", "last_error")
        return {name: {one: getattr(state, one) for one in shown} for name, state in self._states.items()}

    def findings(self) -> list[str]:
        """Name the loops that keep ending."""
        return [
            f"the loop {name} keeps ending: {state.last_error}"
            for name, state in self._states.items()
            if state.in_a_row >= KEEPS_ENDING_AFTER
        ]

    async def _run(self, loops: Mapping[str, Loop]) -> None:
        async with asyncio.TaskGroup() as group:
            for name, loop in loops.items():
                group.create_task(self._keep_running(name, loop), name=name)

    async def _keep_running(self, name: str, loop: Loop) -> None:
        state, task = self._states[name], asyncio.current_task()
        while True:
            since, state.running = monotonic(), True
            try:
                await loop()
                state.last_error = "returned"
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever it was, it starts again
                state.last_error = type(error).__name__
            state.running = False
            if task is not None and task.cancelling():  # by whoever stops the worker, and not within the loop
                raise asyncio.CancelledError
            if monotonic() - since >= STEADY_S:
                state.in_a_row = 0
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**state.in_a_row)
            state.in_a_row += 1
            _log.error("The loop %s ended (%s) and starts again in %.0f s", name, state.last_error, pause)
            await asyncio.sleep(pause)
            state.restarts += 1


def every(
    period_s: float,
    *work: Callable[[], Awaitable[object]],
    first_after_s: float | None = None,
    within_s: float = WITHIN_S,
    last: Callable[[], Awaitable[object]] | None = None,
) -> Loop:
    """Make a loop of rounds: about every `period_s`, do each piece of `work`, none for longer than `within_s`.

    What fails holds up no other piece. An error of ours (the database does not answer) is logged, and the next
    round tries again; any other is a defect and ends the loop after the round. `last` is done when the loop is
    cancelled.
    """

    async def loop() -> None:
        # Jittered, so that replicas do not work in step.
        wait = period_s if first_after_s is None else first_after_s
        try:
            while True:
                await asyncio.sleep(wait * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
                wait = period_s
                await _do_each(work, within_s)
        except asyncio.CancelledError:
            if last is not None:
                task = asyncio.current_task()
                await finish(task.get_name() if task else "?", last)
            raise

    return loop


async def finish(name: str, last: Callable[[], Awaitable[object]]) -> None:
    """Do a last act, for LAST_WITHIN_S at most; what fails is logged, and holds up no other."""
    try:
        async with asyncio.timeout(LAST_WITHIN_S):
            await last()
    except Exception as error:  # noqa: BLE001 - nothing comes after it that could try again
        _log.error("%s: its last act failed (%s)", name, type(error).__name__)


async def _do_each(work: tuple[Callable[[], Awaitable[object]], ...], within_s: float) -> None:
    defects = []
    for piece in work:
        try:
            async with asyncio.timeout(within_s):
                await piece()
        except (DermError, TimeoutError) as error:
            task = asyncio.current_task()
            _log.warning("%s waits: %s", task.get_name() if task else "?", type(error).__name__)
        except Exception as defect:  # noqa: BLE001 - raised below, once the others are done
            defects.append(defect)
    if defects:
        raise defects[0]


#: A check reads the live space through: 50 ms of the database for 50,000 references. Not while the service starts.
CHECK_EVERY_S, FIRST_CHECK_AFTER_S = 600.0, 20.0


class InvariantWatch:
    """What the last check found. A violation is reported and does not take the service down."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._violations: list[Violation] = []
        self._checked_at: datetime | None = None

    async def check(self) -> None:
        """Check now; what is found is logged, too. RecordsUnavailable as the pool says."""
        self._violations = await find_violations(self._pool)
        self._checked_at = datetime.now(UTC)
        for violation in self._violations:
            _log.error("violated: %s (%d rows)", violation.invariant, violation.count)

    def describe(self) -> dict[str, Any]:
        """For /readyz: when the last check was (null before the first), and the invariants that do not hold."""
        return {
            "checked_at": format_time(self._checked_at) if self._checked_at else None,
            "violated": [violation.invariant for violation in self._violations],
        }


#: How often new events are sealed, how long that may take, how often the chain's head is signed, and how often it is
#: looked whether every event has its seal.
SEAL_EVERY_S, SEAL_WITHIN_S, CHECKPOINT_EVERY_S, LOOK_EVERY_S = 2.0, 120.0, 600.0, 30.0
_BATCH = 1_000

_sealing_log = logging.getLogger("derm.audit")


class Sealer:
    """Seals and signs the audit log. One replica at a time seals; the others find nothing to do."""

    def __init__(self, chain: AuditChain, checkpoints: CheckpointLog) -> None:
        self._chain, self._checkpoints = chain, checkpoints
        self._newest: Checkpoint | None = None
        self._fault: str | None = None
        self._sign_at = self._look_at = 0.0
        self._overdue: list[int] = []

    async def work(self) -> None:
        """Seal; sign with the first seals, and every ten minutes."""
        await self.seal()
        if monotonic() >= self._sign_at:
            with contextlib.suppress(IntegrityError):  # said by `sign`, and by /readyz
                await self.sign()
            if self._newest is not None or self._fault is not None:
                self._sign_at = monotonic() + CHECKPOINT_EVERY_S

    async def finish(self) -> None:
        """Seal and sign what came last; without it, that waits for the next start."""
        self._sign_at = 0.0
        await self.work()

    async def seal(self) -> None:
        """Seal every event that has none."""
        while await self._chain.seal(limit=_BATCH) == _BATCH:
            pass

    async def look(self) -> None:
        """Now and then, look for events that have no seal in time, whoever should have made it."""
        if monotonic() >= self._look_at:
            self._overdue = await self._chain.overdue()
            self._look_at = monotonic() + LOOK_EVERY_S

    def findings(self) -> list[str]:
        """Say that events have no seal, if any."""
        return [f"not sealed: {describe_overdue(self._overdue)}"] if self._overdue else []

    async def sign(self) -> None:
        """Sign the chain's head; IntegrityError, and an error in the log, where it is not what was signed before.

        A fault is reported until the chain fits again, which an operator sees to: nothing is signed meanwhile, so
        that what was signed before goes on saying what was done.
        """
        try:
            self._newest = await sign_head(self._chain, self._checkpoints)
        except IntegrityError as error:
            self._fault = str(error)
            _sealing_log.error("The audit log is not what was signed: %s", error)
            raise
        self._fault = None

    def describe(self) -> dict[str, Any]:
        """For /readyz: when the newest checkpoint was signed, and whether the log fits it (null before the first).

        `unsealed` counts the events that should have a seal by now.
        """
        looked = self._newest is not None or self._fault is not None
        return {
            "checkpoint_at": format_time(self._newest.at) if self._newest else None,
            "sound": self._fault is None if looked else None,
            "unsealed": len(self._overdue),
        }
