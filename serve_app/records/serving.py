"""Which model answers: one row in the database, and nothing else; and the history of that row.

The history is for people who look up what answered when. The audit log has each change as well, in the same
transaction: what is in its chain cannot be altered unseen.

Before a running service changes models, the next one is announced, and each ingress replica reports when every
replica of every stage has it ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from datetime import datetime
from time import monotonic
from typing import Literal
from uuid import UUID

from serve_app.audit.events import account_event
from serve_app.audit.rows import SITE_OPERATING_POINTS, vouch
from serve_app.domain.errors import Conflict
from serve_app.records.audit_log import record_event
from serve_app.records.pool import Pool, from_row, queries

_SQL = queries("serving")

#: How often an ingress replica reports, and after how long without a report it is taken to be gone, seconds.
REPORT_EVERY_S = 2.0
_GONE_AFTER_S = 10.0
#: How long a model may take to be ready in every replica.
_READY_WITHIN_S = 120.0
_ASK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class LiveModel:
    """The model that answers, its folder's digest, and the space its embeddings live in.

    `operating_points` are the site's own, by name: they stand in for those of the manifest, and are no part of which
    model it is.
    """

    model_id: str
    model_digest: str
    embedding_space: str
    operating_points: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def identity(self) -> dict[str, str]:
        """Which model it is, by the names of the columns."""
        return {name: getattr(self, name) for name in ("model_id", "model_digest", "embedding_space")}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that every replica is to make ready, and the number of that announcement."""

    announcement: UUID
    model: LiveModel


@dataclass(frozen=True, slots=True)
class Approval:
    """Who lets a model answer and why; the SHA-256 of the report, the publication that it takes back.

    `approved_by` is whom the caller names; the audit event's actor is the account that ran the command. `reason` goes
    into both the history and the audit log, and must speak of no patient.
    """

    action: Literal["publish", "promote", "rollback"] = "publish"
    approved_by: str = "derm-cds"
    reason: str = "started or loaded by the service's own commands"
    report_sha256: str | None = None
    takes_back: int | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """One entry of the history."""

    publication_id: int
    published_at: datetime
    model: LiveModel
    approval: Approval


async def live_model(pool: Pool) -> LiveModel | None:
    """Say which model answers; None when none has been published yet."""
    return await pool.find(LiveModel, _SQL["live_model"])


async def announced(pool: Pool) -> Candidate | None:
    """Say which model is to be made ready, if any."""
    row = await pool.fetchrow(_SQL["announced"])
    return Candidate(row["announcement"], from_row(LiveModel, row)) if row else None


async def report_replica(pool: Pool, replica_id: UUID, *, ready: UUID | None, fault: str | None) -> None:
    """Say that an ingress replica is up: which announcement's model it found ready everywhere, or why not."""
    await pool.execute(_SQL["report_replica"], replica_id, ready, fault)


async def forget_replica(pool: Pool, replica_id: UUID) -> None:
    """Say that an ingress replica stops: nobody waits for it."""
    await pool.execute(_SQL["forget_replica"], replica_id)


async def publish_when_ready(
    pool: Pool,
    model: LiveModel,
    approval: Approval | None = None,
    *,
    over: LiveModel | None = None,
    within_s: float = _READY_WITHIN_S,
) -> None:
    """Have a model made ready in every replica, then publish it; at once where no service runs.

    Raises Conflict as `publish` does, when not every replica has it ready in time, and when another model is
    announced meanwhile; nothing was changed then.
    """
    announcement = await pool.fetchval(_SQL["announce"], *model.identity.values())
    try:
        await _until_ready(pool, model, announcement, within_s)
        await publish(pool, model, approval, over=over)
    finally:
        await pool.execute(_SQL["withdraw"], announcement)


async def _until_ready(pool: Pool, model: LiveModel, announcement: UUID, within_s: float) -> None:
    deadline = monotonic() + within_s
    while True:
        state = await pool.fetchrow(_SQL["readiness"], announcement, _GONE_AFTER_S)
        assert state is not None  # noqa: S101 - counting always gives a row
        if not state["holds"]:
            raise Conflict(
                f"{model.model_id} was being made ready when another model was announced; nothing was changed."
            )
        if state["ready"] == state["running"]:
            return
        if monotonic() >= deadline:
            raise Conflict(
                f"{model.model_id} is ready in {state['ready']} of {state['running']} replicas of the ingress after "
                f"{within_s:.0f} s; nothing was changed. {state['fault'] or 'The others are still loading it.'}"
            )
        await asyncio.sleep(_ASK_EVERY_S)


async def publish(
    pool: Pool, model: LiveModel, approval: Approval | None = None, *, over: LiveModel | None = None
) -> None:
    """Let this model answer from the next request on; needs the owner's role. Safe to repeat.

    The row, its history and the audit event are written together or not at all; a model that answers already
    is not published again, and has no event. Conflict when the same model and digest are already known in another space,
    or when `over` is given and another model than that answers by now.
    """
    given = approval or Approval()
    async with pool.connection() as connection, connection.transaction():
        await connection.execute(_SQL["lock_serving"])
        row = await connection.fetchrow(_SQL["live_model"])
        answering = LiveModel(*row) if row else None
        if over is not None and answering != over:
            raise Conflict(
                f"{answering.model_id if answering else 'No model'} answers by now, and not {over.model_id} "
                "as when this began; nothing was changed."
            )
        if answering == model:
            return
        await connection.execute(_SQL["publish"], *model.identity.values())
        publication_id = await connection.fetchval(
            _SQL["record_publication"], *model.identity.values(), *astuple(given)
        )
        detail = {
            **asdict(given),
            "publication_id": publication_id,
            "before": answering.identity if answering else None,
            "after": model.identity,
        }
        action = detail.pop("action")
        await record_event(connection, account_event(f"model_{action}", detail))


async def set_operating_points(
    pool: Pool, over: LiveModel, points: Mapping[str, float], given: Approval
) -> None:
    """Let the site's own operating points hold for the model that answers; none: its own again. Needs the owner's role.

    The row and the audit event are written together or not at all. Conflict when another model than `over` answers by
    now, or another command has set its points meanwhile.
    """
    async with pool.connection() as connection, connection.transaction():
        await connection.execute(_SQL["lock_serving"])
        row = await connection.fetchrow(_SQL["live_model"])
        answering = LiveModel(*row) if row else None
        if answering != over or answering.operating_points != over.operating_points:
            raise Conflict(
                "The model that answers, or its operating points, changed meanwhile; nothing was changed."
            )
        identity = over.identity
        del identity["embedding_space"]
        told = (given.approved_by, given.reason, given.report_sha256)
        rows = await connection.fetch(_SQL["set_operating_points"], *identity.values(), points, *told)
        why = zip(("approved_by", "reason", "report_sha256"), told, strict=True)
        detail = {**identity, "before": dict(over.operating_points), "after": dict(points), **dict(why)}
        event = account_event("operating_points_set", detail)
        await record_event(connection, vouch(event, SITE_OPERATING_POINTS, rows))


async def operating_points_then(pool: Pool, model_id: str, model_digest: str) -> list[dict[str, float]]:
    """List every set of operating points that the site has ever had for this model."""
    return [row[0] for row in await pool.fetch(_SQL["operating_points_then"], model_id, model_digest)]


async def publications(pool: Pool, *, limit: int = 20, standing: bool = False) -> list[Publication]:
    """List what was published, newest first; `standing` leaves out rollbacks and what they took back.

    The first two that stand are the publication in force and the one that a rollback returns to.
    """
    rows = await pool.fetch(_SQL["publications"], limit, standing)
    return [
        Publication(
            row["publication_id"], row["published_at"], from_row(LiveModel, row), from_row(Approval, row)
        )
        for row in rows
    ]
