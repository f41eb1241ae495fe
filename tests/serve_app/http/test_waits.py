"""Everything that waits has an end: a body that trickles, a stage that hangs before anything is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.http import bodies
from serve_app.lesions import recovery, triage
from tests.serve_app.conftest import until
from tests.serve_app.erasure.erasing import recover, row
from tests.serve_app.lesions.conftest import AlteredStages, failing, hang

HEAD = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
#: Far above what a loaded machine needs; a wait without an end fails the test here.
PATIENCE_S = 60


async def trickle(first: bytes = HEAD, every_s: float = 0.01) -> AsyncIterator[bytes]:
    """A body that goes on for ever, a byte at a time."""
    yield first
    while True:
        await asyncio.sleep(every_s)
        yield b"x"


async def stall(first: bytes = HEAD) -> AsyncIterator[bytes]:
    """A body that stops in the middle."""
    yield first
    await asyncio.Event().wait()


async def send(service, body: AsyncIterator[bytes], **headers: str) -> httpx.Response:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    async with asyncio.timeout(PATIENCE_S):
        return await service.client.post(
            "/api/lesions", content=body, headers={**service.token("dr"), **kind, **headers}
        )


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        (trickle, {"body_timeout_s": 0.3, "body_min_bytes_per_s": 1}),
        (stall, {"body_timeout_s": 0.3, "body_min_bytes_per_s": 1}),
        (trickle, {"body_timeout_s": 3600, "body_min_bytes_per_s": 1_000_000}),
    ],
    ids=["without end", "half sent", "slow"],
)
async def test_a_body_that_takes_too_long_is_refused_and_frees_its_place(
    start_service, monkeypatch, body, bounds: dict[str, Any]
) -> None:
    monkeypatch.setattr(bodies, "GRACE_S", 0.2)
    async with start_service(max_uploads_in_flight=1, **bounds) as service:
        async with service.storing_nothing():
            response = await send(service, body())
        await service.hold_to_failure(response, 408, "body_timeout", "upload")
        assert (await service.upload(await service.care())).status_code == 201


async def test_a_crowd_that_sends_half_of_its_bodies_stops_nobody_else(start_service, monkeypatch) -> None:
    monkeypatch.setattr(bodies, "GRACE_S", 0.05)
    places = 4
    settings = {"body_timeout_s": 3600, "body_min_bytes_per_s": 1e-6}
    async with start_service(max_uploads_in_flight=places, **settings) as service:
        patient = await service.care()
        crowd = [
            asyncio.create_task(send(service, (trickle, stall)[n % 2](), **{"Content-Length": "20000000"}))
            for n in range(places)
        ]
        try:
            async with asyncio.timeout(PATIENCE_S):
                await until(lambda: len(service.app.state.services.admission._places) >= places)
                # Moments after a body has begun, its place is not taken away.
                while (await service.upload(patient)).status_code == 503:  # noqa: ASYNC110 - as a caller tries again
                    await asyncio.sleep(0.05)
                assert (await service.upload(patient)).status_code == 201
                done, _ = await asyncio.wait(crowd, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                service.hold_to_problem(task.result(), 408, "body_timeout")
        finally:
            for task in crowd:
                task.cancel()
            await asyncio.gather(*crowd, return_exceptions=True)


async def test_a_small_body_has_an_end_too(start_service) -> None:
    async with start_service(body_timeout_s=0.2) as service:
        async with asyncio.timeout(PATIENCE_S):
            response = await service.client.post(
                "/api/emergency-access", content=stall(b"{"), headers=service.token("dr")
            )
        service.hold_to_problem(response, 408, "body_timeout")


async def test_a_prepare_that_hangs_is_an_error_and_stores_nothing(
    start_service, local_stages, monkeypatch
) -> None:
    monkeypatch.setattr(triage, "PREPARE_S", 0.2)
    async with start_service(AlteredStages(local_stages(), "prepare", hang, calls={1})) as service:
        patient = await service.care()
        async with service.storing_nothing(), asyncio.timeout(PATIENCE_S):
            response = await service.upload(patient)
        service.hold_to_problem(response, 503, "stage_failed")
        assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("stage", ["prepare", "conclude"])
async def test_a_stage_that_hangs_holds_up_no_recovery_for_good(
    start_service, local_stages, monkeypatch, stage: str
) -> None:
    failed_uploads = AlteredStages(local_stages(), "classify", failing(ValueError()), calls={1, 2})
    seen = {"prepare": {3}, "conclude": {1}}[stage]
    monkeypatch.setattr(recovery, "ATTEMPT_S", 3.0)
    async with start_service(AlteredStages(failed_uploads, stage, hang, calls=seen)) as service:
        uploads = [await service.upload(await service.care()) for _ in range(2)]
        assert [response.status_code for response in uploads] == [202, 202]
        async with asyncio.timeout(PATIENCE_S):
            assert await recover(service) == 1
            assert await recover(service) == 1
        for response in uploads:
            assert (await row(service, response.json()))["outcome"] != "pending"
