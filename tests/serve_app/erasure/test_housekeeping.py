"""What is left lying about: swept when nobody needs it, and never while somebody may."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID

import pytest

from serve_app.domain.errors import Conflict, DataKeyMissing, RecordsUnavailable
from serve_app.erasure import sweeping
from serve_app.erasure.sweeping import erase_expired, stop_awaiting_stored
from serve_app.records.erasures import Held, HoldStore
from serve_app.records.lesions import LesionStore
from serve_app.records.retention import Housekeeping, RetentionStore
from tests.serve_app.conftest import until
from tests.serve_app.erasure.erasing import change, path, row


@pytest.fixture
def housekeeping(service) -> Housekeeping:
    return Housekeeping(service.app.state.services.pool)


async def sweep(service, housekeeping: Housekeeping, **options: int) -> int:
    return await sweeping.sweep_orphaned_keys(
        housekeeping, service.app.state.services.keys, **{"age_s": 0, **options}
    )


async def test_only_keys_without_an_image_are_swept(service, housekeeping) -> None:
    keys = service.app.state.services.keys
    answer = (await service.upload(await service.care())).json()
    orphans = [keys.create().id for _ in range(120)]  # more than a batch
    assert await sweep(service, housekeeping, age_s=3600) == 0
    assert keys.load(orphans[0]).id == orphans[0]
    assert await sweep(service, housekeeping) >= len(orphans)
    for orphan in (orphans[0], orphans[-1]):
        with pytest.raises(DataKeyMissing):
            keys.load(orphan)
    assert (await service.get(path(answer))).content == service.image


async def test_an_upload_that_comes_after_the_sweep_is_refused_and_loses_nothing(
    service, housekeeping, monkeypatch
) -> None:
    """The race: the key is made, the upload stalls for longer than an hour, the key is swept, the image comes."""
    admit, swept = LesionStore.admit, []

    async def stall(self: LesionStore, admission: Any, **named: Any) -> Any:
        swept.append(await sweep(service, housekeeping))
        return await admit(self, admission, **named)

    patient = await service.care()
    before = await service.counts()
    with monkeypatch.context() as patch:
        patch.setattr(LesionStore, "admit", stall)
        response = await service.upload(patient)
    service.hold_to_problem(response, 503, "records_unavailable")
    assert swept[0] >= 1
    assert (await service.counts())["lesion_images"] == before["lesion_images"]
    assert (await service.upload(patient)).status_code == 201


async def test_a_key_whose_image_was_seen_is_never_swept(service, housekeeping, caplog) -> None:
    """As after the restore of a database from before those images: they may come back with the newer one."""
    keys = service.app.state.services.keys
    await sweep(service, housekeeping)
    lost = [keys.create().id for _ in range(2)]
    keys.stop_awaiting(lost)
    failed = keys.create().id
    try:
        assert await sweep(service, housekeeping, max_lost=1) == 0
        assert "2 data keys have lost their image" in caplog.text
        assert keys.load(failed).id == failed
        # So few may be from before the two could be told apart: they stay, and hold up no other.
        assert await sweep(service, housekeeping, max_lost=2) >= 1
        assert [keys.load(key).id for key in lost] == lost
        with pytest.raises(DataKeyMissing):
            keys.load(failed)
        found = await sweeping.find_orphaned_keys(housekeeping, keys, age_s=0)
        assert (set(found.lost), list(found.failed)) == (set(lost), [])
    finally:
        assert await sweeping.shred_orphaned_keys(housekeeping, keys, lost) == 2


async def test_an_image_that_is_in_is_awaited_no_more(service, housekeeping) -> None:
    keys = service.app.state.services.keys
    answer = (await service.upload(await service.care())).json()
    await stop_awaiting_stored(housekeeping, keys)
    orphan = keys.create().id
    await stop_awaiting_stored(housekeeping, keys)
    awaited = keys.list_awaited()
    assert orphan in awaited
    assert UUID(str((await row(service, answer))["data_key_id"])) not in awaited
    keys.shred(orphan)
    assert orphan not in keys.list_awaited()


async def test_a_condemned_key_is_found_again_after_a_crash(service, housekeeping, monkeypatch) -> None:
    """And while the database does not answer, nothing is swept."""
    keys = service.app.state.services.keys
    orphan = keys.create().id
    monkeypatch.setattr(Housekeeping, "condemn", AsyncMock(side_effect=RecordsUnavailable))
    with pytest.raises(RecordsUnavailable):
        await sweep(service, housekeeping)
    monkeypatch.undo()
    assert keys.load(orphan).id == orphan
    assert await housekeeping.condemn([orphan]) == [orphan]
    assert await sweep(service, housekeeping) >= 1
    with pytest.raises(DataKeyMissing):
        keys.load(orphan)


async def test_idempotency_keys_expire_but_for_pending_ones(service, housekeeping) -> None:
    patient = await service.care()
    for key in ("old", "waits", "new"):
        headers = {"Idempotency-Key": f"expiry-{key}"}
        answer = (await service.upload(patient, headers=headers)).json()
        if key == "waits":
            waits = "outcome = 'pending', answer = NULL, completed_at = NULL"
            await change(service, answer, "assessments", waits)
        if key != "new":
            await service.owner.execute(
                "UPDATE idempotency_keys SET created_at = now() - interval '8 days' WHERE key = $1",
                headers["Idempotency-Key"],
            )
    said = (
        "INSERT INTO idempotency_keys (actor, key, request_sha256, lesion_id, created_id, created_at)"
        " SELECT actor, 'expiry-said', request_sha256, lesion_id, gen_random_uuid(), now() - interval '8 days'"
        " FROM idempotency_keys WHERE key = 'expiry-new'"
    )
    await service.owner.execute(said)
    assert await housekeeping.expire_idempotency_keys(days=7) >= 1
    query = "SELECT key FROM idempotency_keys WHERE key LIKE 'expiry-%' ORDER BY key"
    assert [row["key"] for row in await service.owner.fetch(query)] == ["expiry-new", "expiry-waits"]
    # Left as they are, the service's own housekeeping would change other tests' counts.
    await service.owner.execute("DELETE FROM idempotency_keys WHERE key LIKE 'expiry-%'")


async def test_only_closed_records_expire_and_a_hold_keeps_them(service) -> None:
    services, store = service.app.state.services, RetentionStore(service.owner)
    closed, held, opened = [await service.care() for _ in range(3)]
    answers = {patient: (await service.upload(patient)).json() for patient in (closed, held, opened)}
    long_ago = datetime.now(UTC) - timedelta(days=400)
    await service.owner.execute(
        "UPDATE lesion_images SET created_at = $1 WHERE patient_id = ANY($2::text[])",
        long_ago,
        [closed, held, opened],
    )
    for patient in (closed, held):
        await store.close(patient, closed_at=long_ago, actor="ops")
    with pytest.raises(Conflict, match="closed already"):
        await store.close(closed, closed_at=long_ago, actor="ops")
    image = Held(image_id=UUID(answers[held]["image_id"]))
    hold = await HoldStore(service.owner).set(image, reason="case 9", actor="counsel")
    assert (await store.count(days=500)).expired == 0
    counted = await store.count(days=365)
    assert (counted.expired, counted.held) == (2, 1)
    assert await erase_expired(store, services.eraser, days=365, actor="ops") == 1
    outcomes = {patient: (await row(service, answer))["outcome"] for patient, answer in answers.items()}
    assert outcomes[closed] == "erased"
    assert "erased" not in (outcomes[held], outcomes[opened])
    reason = await service.owner.fetchval(
        "SELECT reason FROM erasures WHERE image_id = $1::text::uuid", answers[closed]["image_id"]
    )
    assert reason == "retention"
    await HoldStore(service.owner).release(hold, actor="counsel")
    await store.reopen(held, actor="ops")
    assert await erase_expired(store, services.eraser, days=365, actor="ops") == 0


async def test_nothing_is_erased_by_its_age_while_the_database_is_in_doubt(
    start_service, monkeypatch, caplog
) -> None:
    """After a restore that forgot holds and reopened records; and not before an operator has seen to them."""
    monkeypatch.setattr(sweeping, "ERASURES_EVERY_S", 0.05)
    monkeypatch.setattr(sweeping, "REST_EVERY_S", 0.05)
    async with start_service(retention_days=365) as service:
        services = service.app.state.services
        paused = services.settings.files.retention_paused
        sweeping.pause(paused, "a restore")
        patient, long_ago = await service.care(), datetime.now(UTC) - timedelta(days=400)
        answer = (await service.upload(patient)).json()
        await service.owner.execute(
            "UPDATE lesion_images SET created_at = $1 WHERE patient_id = $2", long_ago, patient
        )
        await RetentionStore(service.owner).close(patient, closed_at=long_ago, actor="ops")
        await until(lambda: "no key swept: since" in caplog.text)
        assert (await service.get("/readyz")).json()["retention_waits"].endswith(": a restore")
        assert (await row(service, answer))["outcome"] != "erased"
        # Nor where it was restored by other means, which the checkpoints show.
        paused.unlink()
        monkeypatch.setattr(services.sealer, "describe", lambda: {"sound": False})
        assert services.retention_waits() == "the audit log is not what was signed"
        monkeypatch.undo()

        async def erased() -> bool:
            return (await row(service, answer))["outcome"] == "erased"

        await until(erased)
        assert (await service.get("/readyz")).json()["retention_waits"] is None
