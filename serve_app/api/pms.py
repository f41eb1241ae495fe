"""The ties to the PMS that are configured: who is asked of patients, and who is told of assessments."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from datetime import timedelta

from serve_app.api.delivery import Delivery
from serve_app.pms.client import PmsClient
from serve_app.pms.consultation import RecordConsultation
from serve_app.pms.http_directory import PmsDirectory
from serve_app.records.lesions import LesionStore
from serve_app.records.outbox import Outbox
from serve_app.records.patients import PatientTable
from serve_app.records.pool import Pool
from serve_app.settings import Settings


@dataclass(frozen=True, slots=True)
class PmsTies:
    """Each part is None where it is not configured."""

    url: str | None
    client: PmsClient | None
    consultation: RecordConsultation | None
    outbox: Outbox | None
    delivery: Delivery | None

    def start(self) -> tuple[asyncio.Task[None], ...]:
        """Start delivering, where there is something to deliver; whoever starts it cancels it."""
        return () if self.delivery is None else (asyncio.create_task(self.delivery.deliver_forever()),)

    async def describe(self) -> dict[str, int | float | None] | None:
        """For /readyz: what waits for the PMS and what is dead; None where nothing is delivered."""
        return None if self.outbox is None else asdict(await self.outbox.counts())

    async def close(self) -> None:
        """Close the connections to the PMS."""
        if self.client is not None:
            await self.client.close()


def open_pms(settings: Settings, pool: Pool, records: LesionStore) -> PmsTies:
    """Put together what the settings ask for; nothing connects before its first use."""
    url, client = settings.pms_url, None
    if url is not None:
        client = PmsClient(url, token_file=settings.pms_token_file, ca_file=settings.pms_ca_file)
    outbox = delivery = None
    if url is not None and client is not None and settings.pms_deliver:
        outbox = Outbox(pool)
        delivery = Delivery(
            outbox=outbox,
            records=records,
            client=client,
            pms_url=url,
            dead_after=timedelta(days=settings.pms_dead_after_days),
        )
    return PmsTies(url, client, _consultation(settings, pool, client), outbox, delivery)


def _consultation(settings: Settings, pool: Pool, client: PmsClient | None) -> RecordConsultation | None:
    if settings.patient_directory == "local":
        return RecordConsultation(PatientTable(pool, timeout_s=settings.pms_timeout_s))
    if settings.patient_directory == "pms" and client is not None:
        directory = PmsDirectory(client, timeout_s=settings.pms_timeout_s, max_age_s=settings.pms_cache_s)
        return RecordConsultation(directory)
    return None
