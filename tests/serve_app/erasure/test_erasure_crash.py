"""An erasure that meets a crash, a key store that is away, a restored backup, an assessment still pending."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
import sqlite3
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import pytest

from serve_app.domain.errors import Erased, RecordsUnavailable
from serve_app.keys.envelope import ImageBinding
from serve_app.keys.keystore import DestroyedKey
from serve_app.lesions.recovery import FAILED_AFTER_TRIES
from serve_app.records.erasures import ErasureStore, Verdict
from serve_app.settings import NodeFiles
from tests.serve_app.erasure.erasing import change, damage, erase, path, recover, request_of, row, uploaded


@pytest.mark.parametrize("step", ["accepted", "destroyed"])
async def test_what_was_accepted_is_finished_after_a_crash(service, answer, step: str) -> None:
    """The process dies after the named step: what it had done is on disk, what it had not is not."""
    services = service.app.state.services
    erasures = ErasureStore(services.pool)
    request = request_of(answer)
    assert await erasures.accept(request) is Verdict.ACCEPTED
    erasure = await erasures.find(request.lesion_id, request.image_id)
    if step == "destroyed":
        names = ("data_key_id", "receipt_id", "reason", "actor")
        services.keys.destroy(DestroyedKey(**{name: getattr(erasure, name) for name in names}))
    reading = await service.get(f"{path(answer)}/receipt")
    assert (reading.status_code, reading.json()["record_hash"]) == (202, None)
    assert await services.eraser.finish_accepted(older_than_s=0) >= 1
    assert await services.eraser.finish_accepted(older_than_s=0) == 0
    with pytest.raises(Erased):
        services.keys.load(erasure.data_key_id)
    read = await service.get(f"{path(answer)}/receipt")
    assert (read.status_code, read.json()["receipt_id"]) == (200, str(erasure.receipt_id))
    events = await service.owner.fetch(
        "SELECT action FROM audit_events WHERE image_id = $1 AND request_id = 'crashed'", request.image_id
    )
    assert sorted(event["action"] for event in events) == ["erase", "erased"]


@contextmanager
def key_elsewhere(settings, data_key_id: UUID) -> Iterator[None]:
    """This node's key store has never held the key of this image; afterwards it does."""
    with closing(sqlite3.connect(NodeFiles(settings.home).keystore)) as connection:
        key = {"id": data_key_id.bytes}
        with connection:
            row = connection.execute("SELECT * FROM data_keys WHERE data_key_id = :id", key).fetchone()
            connection.execute("DELETE FROM data_keys WHERE data_key_id = :id", key)
        yield
        with connection:
            connection.execute("INSERT INTO data_keys VALUES (?, ?, ?, ?, ?)", row)


async def receipts(service, *images: dict[str, Any]) -> list[bool]:
    """Whether each has one."""
    found = [(await service.get(f"{path(image)}/receipt")).status_code for image in images]
    assert set(found) <= {200, 202}
    return [status == 200 for status in found]


async def test_an_erasure_is_proven_only_where_the_key_was(service, settings, answer) -> None:
    """A node without the image's key signs nothing, and finishes all others; the one that has it does."""
    services, later = service.app.state.services, await uploaded(service)
    erasures = ErasureStore(services.pool)
    data_key_id = (await row(service, answer))["data_key_id"]
    with key_elsewhere(settings, data_key_id):
        for _ in range(2):
            missing = await erase(service, answer)
            service.hold_to_problem(missing, 503, "data_key_missing")
        assert [event["action"] for event in await service.events(missing)] == ["erase"]
        assert (await service.events(missing))[0]["outcome"] == "failed"
        assert (await row(service, answer))["sealed"] is None  # accepted all the same
        assert await erasures.accept(request_of(later)) is Verdict.ACCEPTED
        await services.eraser.finish_accepted(older_than_s=0)
        assert await receipts(service, answer, later) == [False, True]
        assert data_key_id not in {key.data_key_id for _, key in services.keys.list_destroyed()}
    assert await services.eraser.finish_accepted(older_than_s=0) == 1
    assert await receipts(service, answer) == [True]
    with pytest.raises(Erased):
        services.keys.load(data_key_id)


async def test_more_erasures_than_a_page_without_their_keys_hold_up_no_other(service, settings) -> None:
    services, images = service.app.state.services, [await uploaded(service) for _ in range(3)]
    erasures = ErasureStore(services.pool)
    ids = [(await row(service, image))["data_key_id"] for image in images]
    with key_elsewhere(settings, ids[0]), key_elsewhere(settings, ids[1]):
        for image in images:
            assert await erasures.accept(request_of(image)) is Verdict.ACCEPTED
        assert await services.eraser.finish_accepted(older_than_s=0, limit=1) == 1
        assert await receipts(service, *images) == [False, False, True]
    assert await services.eraser.finish_accepted(older_than_s=0, limit=1) == 2


async def test_a_key_store_that_does_not_answer_is_an_erasure_accepted(service, answer, monkeypatch) -> None:
    monkeypatch.setattr(service.app.state.services.keys, "destroy", Mock(side_effect=RecordsUnavailable))
    accepted = await erase(service, answer)
    assert accepted.status_code == 202
    assert int(accepted.headers["retry-after"]) > 0
    service.hold_to("ErasureDocument", accepted.json())
    service.hold_to_problem(await service.get(path(answer)), 410, "erased")
    monkeypatch.undo()
    finished = await erase(service, answer)
    assert finished.status_code == 200
    assert finished.json()["receipt_id"] == accepted.json()["receipt_id"]


async def test_a_backup_from_before_opens_nothing_and_is_erased_again(service, answer) -> None:
    """The clinical rows as a restored backup would have them; the key store is the one of today."""
    services = service.app.state.services
    before = await row(service, answer)
    binding = ImageBinding(before["image_id"], before["patient_id"], before["content_type"])
    assert services.keys.open_image(before["sealed"], binding) == service.image
    receipt = (await erase(service, answer)).json()
    with pytest.raises(Erased):
        services.keys.open_image(before["sealed"], binding)
    async with service.owner.connection() as connection, connection.transaction():
        for table in ("erasure_receipts", "erasures"):
            await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            forget = f"DELETE FROM {table} WHERE receipt_id = $1::text::uuid"  # noqa: S608 - our own names
            await connection.execute(forget, receipt["receipt_id"])
            await connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
    await change(service, answer, "lesion_images", "sealed = $2, erased_at = NULL", before["sealed"])
    values = (before["outcome"], before["answer"], before["context"])
    await change(service, answer, "assessments", "outcome = $2, answer = $3, context = $4", *values)
    gone = await service.get(path(answer))
    service.hold_to_problem(gone, 410, "erased")
    assert await services.eraser.erase_restored() == 1
    assert await services.eraser.erase_restored() == 0
    again = await row(service, answer)
    assert (again["sealed"], again["answer"]) == (None, None)
    read = await service.get(f"{path(answer)}/receipt")
    assert read.json()["receipt_id"] == receipt["receipt_id"]


async def pending(service) -> dict[str, Any]:
    """An upload whose process died after the first commit."""
    answer: dict[str, Any] = (await service.upload(await service.care())).json()
    await service.owner.execute(
        "DELETE FROM lesion_embeddings WHERE image_id = $1::text::uuid", answer["image_id"]
    )
    trigger = "ALTER TABLE assessments {} TRIGGER assessments_keep_demand"
    await service.owner.execute(trigger.format("DISABLE"))
    unfinished = (
        "outcome = 'pending', answer = NULL, completed_at = NULL, demand_level = NULL, demand_urgency = NULL"
    )
    await change(service, answer, "assessments", unfinished)
    await service.owner.execute(trigger.format("ENABLE"))
    return answer


async def test_a_pending_assessment_of_an_erased_image_is_cancelled(service) -> None:
    answer = await pending(service)
    assert (await erase(service, answer)).status_code == 200
    assert (await row(service, answer))["outcome"] == "cancelled"
    assert await recover(service) == 0
    after = await row(service, answer)
    assert (after["outcome"], after["vectors"]) == ("cancelled", 0)


async def test_recovery_without_the_images_key_leaves_it_pending(service, settings) -> None:
    answer = await pending(service)
    with key_elsewhere(settings, (await row(service, answer))["data_key_id"]):
        for _ in range(FAILED_AFTER_TRIES + 2):
            assert await recover(service) == 0
        assert (await row(service, answer))["outcome"] == "pending"
        missing = await service.get(path(answer))
        service.hold_to_problem(missing, 503, "data_key_missing")
        assert [event["detail"] for event in await service.events(missing)] == [{"code": "data_key_missing"}]
    assert await recover(service) == 1


@pytest.mark.parametrize("cause", ["image_too_small", "integrity"])
async def test_an_image_that_can_never_be_assessed_ends_as_failed_once(
    start_service, local_stages, service, cause: str
) -> None:
    answer = await pending(service)
    if cause == "integrity":
        await damage(service, answer)
    async with start_service(local_stages(min_side=1000 if cause == "image_too_small" else 224)) as other:
        for tried in range(FAILED_AFTER_TRIES + 2):
            found = await row(service, answer)
            assert found["outcome"] == ("pending" if tried < FAILED_AFTER_TRIES else "failed")
            await recover(other)
    seen = await service.get(f"/api/lesions/{answer['lesion_id']}")
    service.hold_to("TimelineDocument", seen.json())
    (shown,) = seen.json()["assessments"]
    assert (shown["outcome"], shown["reasons"][0]["code"]) == ("failed", cause)
    events = await service.owner.fetch(
        "SELECT detail FROM audit_events WHERE action = 'classify' AND outcome = 'failed'"
        " AND image_id = $1::text::uuid",
        answer["image_id"],
    )
    assert [event["detail"]["code"] for event in events] == [cause]
