"""What the routes work with, made once a process, and the loops that run beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from functools import partial
from time import monotonic
from typing import Annotated, Any

from fastapi import Depends, Request

from serve_app import worker
from serve_app.access.rate_limit import WINDOW_S
from serve_app.audit.checkpoints import CheckpointLog
from serve_app.audit.events import RETENTION
from serve_app.domain.errors import InvalidSetting
from serve_app.erasure import sweeping
from serve_app.erasure.eraser import Eraser
from serve_app.hooks.service import HookService
from serve_app.http.access import Authenticator
from serve_app.http.bodies import AdmissionGate
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.lesions import live_model, recovery
from serve_app.lesions.assess import Assessor, Searcher, Stages
from serve_app.lesions.live_model import LiveModelWatch
from serve_app.lesions.replay import Replayer
from serve_app.lesions.triage import Triage
from serve_app.pms import delivery
from serve_app.pms.delivery import open_pms
from serve_app.records import serving
from serve_app.records.access import AccessStore
from serve_app.records.audit_log import AuditChain
from serve_app.records.erasures import ErasureStore
from serve_app.records.hooks import HookStore
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.reports import ReportStore
from serve_app.records.retention import Housekeeping, RetentionStore, claim_key_store, refuse_lost_keys
from serve_app.records.reviews import ReviewStore
from serve_app.records.worklist import WorklistStore
from serve_app.reports import drift_watch, publication
from serve_app.reports.drift_watch import DriftWatch
from serve_app.reports.publication import Reports
from serve_app.settings import Settings, find_untrustworthy, read_hooks
from serve_app.version import service_version
from serve_app.worker import InvariantWatch, Loop, Sealer, Worker, every

#: What waits and what came to nothing, by kind: for /readyz and for the metrics.
Counts = Mapping[str, Mapping[str, float | None] | None]
#: How long what /readyz has looked up is its answer, seconds.
READY_FOR_S = 1.0
#: How often the counts are handed on as metrics.
COUNT_EVERY_S = 15.0


class Services:
    """The parts behind the interface."""

    def __init__(self, settings: Settings, stages: Stages, pool: Pool, keys: KeyStore, version: str) -> None:
        """`version` is the service's own, for every answer's provenance."""
        self.settings, self.pool, self.keys, files = settings, pool, keys, settings.files
        self.records, self.access = LesionStore(pool), AccessStore(pool)
        self.worklist = WorklistStore(pool, settings.due_days)
        self.live = LiveModelWatch(pool, settings.models, stages.warm)
        self.invariants = InvariantWatch(pool)
        self.drift = DriftWatch(pool)
        checkpoints = CheckpointLog(files.audit_checkpoints, files.audit_signing_key)
        self.sealer = Sealer(AuditChain(pool), checkpoints)
        self.pms = open_pms(settings, pool, self.records)
        consultation, tells_pms = self.pms.consultation, self.pms.delivery is not None
        self.tells_fhir = tells_fhir = tells_pms and settings.pms_fhir
        assessor = Assessor(stages, service_version=version)
        self.reviews, self.tells_pms = ReviewStore(pool), tells_pms
        self.triage = Triage(
            assessor=assessor,
            records=self.records,
            keys=keys,
            consultation=consultation,
            tells_pms=tells_pms,
            tells_fhir=tells_fhir,
        )
        self.replayer = Replayer(
            assessor=assessor, pool=pool, records=self.records, keys=keys, models=settings.models
        )
        self.searcher = Searcher(stages=stages, records=self.records, references=ReferenceStore(pool))
        self.eraser = Eraser(ErasureStore(pool), keys, tells_pms=tells_pms, tells_fhir=tells_fhir)
        self.reports = Reports(
            store=ReportStore(pool), client=self.pms.client, tells_pms=settings.pms_reports
        )
        self.admission = AdmissionGate(settings)
        self.authenticator = Authenticator(settings, self.access, self.records)
        hooks = read_hooks(settings.hooks_clients) if settings.hooks_clients else None
        self.hook_records = HookStore(pool)
        self.hooks = HookService(hooks, self.hook_records, self.records) if hooks else None
        self.worker = Worker()
        self._readiness: asyncio.Task[Mapping[str, Any]] | None = None
        self._look_again_at = 0.0

    def retention_waits(self) -> str | None:
        """Why nothing is erased by its age and no key swept, where the database is in doubt; None as it should be.

        After a restore, holds and reopened records may be forgotten.
        """
        if self.sealer.describe()["sound"] is False:
            return "the audit log is not what was signed"
        return sweeping.read_pause(self.settings.files.retention_paused)

    async def counts(self) -> Counts:
        """Count the assessments without an answer, what was not told to the PMS (None where nothing is), and drifts."""
        return {
            "assessments": asdict(await self.records.counts()),
            "outbox": await self.pms.describe(),
            "drift": self.drift.counts(),
        }

    async def readiness(self) -> Mapping[str, Any]:
        """What there is to know of this replica, looked up once in READY_FOR_S, for all that ask meanwhile.

        RecordsUnavailable when the database does not answer, for as long.
        """
        if self._readiness is None or (self._readiness.done() and monotonic() >= self._look_again_at):
            self._readiness = asyncio.create_task(self._look())
        return await asyncio.shield(self._readiness)  # whoever goes away takes it from nobody

    async def _look(self) -> Mapping[str, Any]:
        try:
            await serving.live_model(self.pool)
            live = await self.live.current()
            counts = await self.counts()
            findings = [*self.worker.findings(), *self.sealer.findings(), *self.drift.findings()]
            if (outbox := counts["outbox"]) and (wrong := outbox["wrong_encounter"]):
                findings.append(
                    f"{wrong} messages name another patient's encounter and were not sent: `derm-cds outbox list --dead`"
                )
            return {
                "status": "ready",
                "model_id": live.model_id,
                "embedding_space": live.embedding_space,
                "refused_model": self.live.refused,
                "invariants": self.invariants.describe(),
                "audit": self.sealer.describe(),
                "loops": self.worker.describe(),
                "findings": findings,
                "retention_waits": self.retention_waits(),
                **counts,
            }
        finally:
            self._look_again_at = monotonic() + READY_FOR_S


async def _services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


#: The services, for a route.
Parts = Annotated[Services, Depends(_services_of)]


@asynccontextmanager
async def open_services(
    settings: Settings, stages: Stages, *, observe: Callable[[Counts], None] | None = None
) -> AsyncIterator[Services]:
    """Open pool and key store, put the parts together, and run the loops; `observe` is told the counts now and then.

    IntegrityError when the key store is another keyring's or another database's, or lost; KeyProviderUnavailable
    when the keyring is; in production InvalidSetting when others could change whom this node believes.
    """
    if settings.env == "production" and (found := find_untrustworthy(settings)):
        raise InvalidSetting(f"Refused in production: {'; '.join(found)}.")
    async with AsyncExitStack() as closing:
        pool = await open_pool(
            settings.database_url.get_secret_value(),
            minimum=settings.database_pool_min,
            maximum=settings.database_pool_max,
            timeout_s=settings.database_timeout_s,
        )
        closing.push_async_callback(pool.close)
        keystore = settings.files.keystore
        await refuse_lost_keys(pool, keystore)
        keys = KeyStore(keystore, open_key_provider(settings, first_start=not keystore.exists()))
        closing.callback(keys.close)
        await claim_key_store(pool, keys, keystore)
        version = await asyncio.to_thread(service_version)
        services = Services(settings, stages, pool, keys, version)
        closing.push_async_callback(services.pms.close)
        # Once the loops have ended: what they write last is sealed and signed, too.
        closing.push_async_callback(worker.finish, "sealing", services.sealer.finish)
        async with services.worker.running(_loops(services, observe)):
            yield services


def _loops(services: Services, observe: Callable[[Counts], None] | None) -> dict[str, Loop]:
    """Every loop of this replica, by the name that /readyz shows."""
    settings, live, eraser = services.settings, services.live, services.eraser
    housekeeping, keys = Housekeeping(services.pool), services.keys

    def unless_in_doubt(work: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
        async def guarded() -> None:
            if (reason := services.retention_waits()) is None:
                await work()
            else:
                sweeping.logger.error("Nothing is erased by its age, and no key swept: %s", reason)

        return guarded

    rest: list[Callable[[], Awaitable[object]]] = [
        eraser.erase_restored,
        partial(housekeeping.expire_idempotency_keys, days=settings.idempotency_days),
        unless_in_doubt(partial(sweeping.sweep_orphaned_keys, housekeeping, keys)),
    ]
    if settings.retention_days is not None:
        retention, days = RetentionStore(services.pool), settings.retention_days
        erase = partial(sweeping.erase_expired, retention, eraser, days=days, actor=RETENTION)
        rest.append(unless_in_doubt(erase))
    loops = {
        "live_model": every(live_model.PERIOD_S, live.follow, first_after_s=0),
        "replica_report": every(serving.REPORT_EVERY_S, live.report, first_after_s=0, last=live.leave),
        "recovery": every(
            recovery.PERIOD_S, partial(recovery.recover_once, services.records, services.triage, live)
        ),
        "sealing": every(
            *(worker.SEAL_EVERY_S, services.sealer.work, services.sealer.look),
            first_after_s=0,
            within_s=worker.SEAL_WITHIN_S,
        ),
        "refusal_summaries": every(
            WINDOW_S, services.authenticator.summarise, last=services.authenticator.summarise
        ),
        "invariants": every(
            worker.CHECK_EVERY_S, services.invariants.check, first_after_s=worker.FIRST_CHECK_AFTER_S
        ),
        "drift": every(
            drift_watch.LOOK_EVERY_S, services.drift.look, first_after_s=worker.FIRST_CHECK_AFTER_S
        ),
        "erasures": every(
            sweeping.ERASURES_EVERY_S,
            eraser.finish_accepted,
            partial(sweeping.stop_awaiting_stored, housekeeping, keys),
        ),
        "sweeping": every(sweeping.REST_EVERY_S, *rest, first_after_s=sweeping.ERASURES_EVERY_S),
    }
    loops["report_counts"] = every(publication.COUNT_EVERY_S, services.reports.store.count)
    loops["reports"] = every(
        publication.LOOK_EVERY_S, services.reports.publish_due, first_after_s=publication.FIRST_LOOK_AFTER_S
    )
    if services.hooks is not None:
        loops["hook_tokens"] = every(WINDOW_S, services.hooks.forget_tokens)
    if services.pms.delivery is not None:
        loops["delivery"] = every(delivery.PERIOD_S, services.pms.delivery.deliver_due)
    if observe is not None:
        tell = observe

        async def count() -> None:
            tell(await services.counts())

        loops["counts"] = every(COUNT_EVERY_S, count, first_after_s=0)
    return loops
