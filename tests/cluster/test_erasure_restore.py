"""The drill of an erasure: a backup from before it, restored after it, with the key store of today."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from pydantic import SecretStr
import pytest

from benchmarks.baseline import LocalStages
from deployments.preprocess.decode import UploadLimits
from serve_app.access.tokens import mint_token
from serve_app.audit.events import account_event
from serve_app.domain.errors import Erased
from serve_app.erasure import sweeping as housekeeping
from serve_app.erasure.eraser import Eraser
from serve_app.http.app import create_app
from serve_app.keys.receipts import ErasureReason
from serve_app.records.access import AccessStore
from serve_app.records.erasures import Erasure, ErasureRequest, ErasureStore
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import ReferenceStore
from serve_app.settings import Settings
from tests.cluster.clinic import Clinic

SECRET = "a secret of the tests, long enough for HS256"


def erase(clinic: Clinic, at: tuple[UUID, UUID]) -> Erasure:
    """Erase as the service does: accepted, destroyed, proven."""
    request = ErasureRequest(
        lesion_id=at[0],
        image_id=at[1],
        reason=ErasureReason.PATIENT_REQUEST,
        actor="chief",
        request_id="erasing",
    )
    with closing(clinic.open_keys()) as keys:
        erasure, accepted = clinic.ask(lambda pool: Eraser(ErasureStore(pool), keys).erase(request))
    assert accepted
    assert erasure.receipt is not None
    return erasure


def sealed_bytes(clinic: Clinic, image_id: UUID) -> int | None:
    query = "SELECT octet_length(sealed) FROM lesion_images WHERE image_id = $1"
    return clinic.ask(lambda pool: pool.fetchval(query, image_id))


def test_an_erasure_outlives_the_backup_from_before_it(
    clinic: Clinic, derm_cds, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder = clinic.home, tmp_path / "before"
    made = derm_cds("backup", str(folder), home=home)
    assert made.code == 0, made.err
    erased, *kept = clinic.images
    erasure = erase(clinic, erased)
    assert sealed_bytes(clinic, erased[1]) is None
    clinic.server.stop()
    restored = derm_cds("restore", str(folder), home=home)
    assert restored.code == 0, restored.err

    # The ciphertext is back, the erasure forgotten: and still nothing opens it.
    assert sealed_bytes(clinic, erased[1])
    assert clinic.ask(lambda pool: pool.fetchval("SELECT count(*) FROM erasures")) == 0
    with pytest.raises(Erased):
        clinic.open_image(erased)

    monkeypatch.setattr(housekeeping, "ERASURES_EVERY_S", 0.3)
    settings = Settings(
        home=home,
        database_url=SecretStr(clinic.server.ensure().app),
        token_secret=SecretStr(SECRET),
        models=models,
    )
    asyncio.run(_read_all(clinic, settings, erased, kept, erasure))
    assert sealed_bytes(clinic, erased[1]) is None
    assert derm_cds("audit", "verify", home=home).code == 0
    del clinic.images[erased]


async def _read_all(
    clinic: Clinic,
    settings: Settings,
    erased: tuple[UUID, UUID],
    kept: list[tuple[UUID, UUID]],
    erasure: Erasure,
) -> None:
    """Start the service on what was restored, and read every image of it as a clinician does."""
    pool = await open_pool(settings.database_url.get_secret_value(), minimum=0, maximum=2, timeout_s=20)
    try:
        await _assign_all(clinic)
        # None of this clinic's images is to be assessed: what is there is read, and erased.
        stages = LocalStages(
            models=settings.models,
            references=ReferenceStore(pool),
            limits=UploadLimits(),
            threads=1,
            policy_version="2026-11.4",
        )
        app = create_app(settings, stages)
        token = mint_token(
            secret=SECRET, issuer="derm-cds", audience="derm-cds", subject="dr", roles=("clinician",)
        )
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://derm",
                headers={"Authorization": f"Bearer {token}"},
            ) as client,
        ):
            await _look_at_images(client, clinic, erased, kept)
            receipt = await _await_receipt(client, erased)
            assert receipt["receipt_id"] == str(erasure.receipt_id)
            assert (receipt["actor"], receipt["reason"]) == ("chief", "patient_request")
            assert receipt["ciphertext_sha256"] == erasure.ciphertext_sha256.hex()
            (shown,) = (await client.get(f"/api/lesions/{erased[0]}")).json()["assessments"]
            assert shown["erasure"]["receipt_id"] == str(erasure.receipt_id)
            await _look_at_images(client, clinic, erased, kept)
    finally:
        await pool.close()


async def _look_at_images(client: httpx.AsyncClient, clinic: Clinic, erased, kept) -> None:
    gone = await client.get(_path(erased))
    assert (gone.status_code, gone.json()["code"]) == (410, "erased")
    for at in kept:
        assert (await client.get(_path(at))).content == clinic.images[at]


async def _await_receipt(client: httpx.AsyncClient, at: tuple[UUID, UUID]) -> dict[str, Any]:
    """Wait for housekeeping to find what the restore brought back."""
    async with asyncio.timeout(20):
        while (answer := await client.get(f"{_path(at)}/receipt")).status_code != 200:  # noqa: ASYNC110 - its own task
            await asyncio.sleep(0.1)
    return answer.json()


async def _assign_all(clinic: Clinic) -> None:
    owner: Pool = await open_pool(clinic.server.ensure().owner, minimum=0, maximum=1, timeout_s=20)
    try:
        patients = await owner.fetch("SELECT DISTINCT patient_id, now() AS since FROM lesions")
        for row in patients:
            await AccessStore(owner).assign(
                row["patient_id"], "dr", starts_at=row["since"], ends_at=None, event=account_event("assign")
            )
    finally:
        await owner.close()


def _path(at: tuple[UUID, UUID]) -> str:
    return f"/api/lesions/{at[0]}/images/{at[1]}"
