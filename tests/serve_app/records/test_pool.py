"""Whatever happens to the server, calls fail in time and as RecordsUnavailable, and then work again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
import signal
import tempfile
from threading import Event, Thread
import time

import psutil
import pytest

from cluster.postgres import EmbeddedPostgres, supervise
from serve_app.domain.errors import RecordsUnavailable
from serve_app.records.lesions import LesionStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool


@pytest.fixture(scope="module")
async def doomed():
    """A server of this module's own, to be killed, with its supervisor, its URLs and a pool."""
    with tempfile.TemporaryDirectory(prefix="derm-test-") as home:
        server = EmbeddedPostgres(Path(home))
        urls = await asyncio.to_thread(server.ensure)
        stop = Event()
        supervisor = Thread(target=supervise, args=(server, stop))
        try:
            await migrate(urls.owner, application_role="derm_app")
            supervisor.start()
            pool = await open_pool(urls.app, minimum=1, maximum=3, timeout_s=2)
            yield server, urls, pool
            await pool.close()
        finally:
            stop.set()
            if supervisor.is_alive():
                supervisor.join()
            server.stop()


async def _answers(pool, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            assert await pool.fetchval("SELECT 1") == 1
        except RecordsUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        else:
            return


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
async def test_nothing_acknowledged_is_lost_when_the_server_dies(doomed, admission, how) -> None:
    server, _urls, pool = doomed
    store = LesionStore(pool)
    acknowledged, failed = [], 0

    async def keep_admitting() -> None:
        nonlocal failed
        since = time.monotonic()
        while not failed and time.monotonic() - since < 60:
            new = admission()
            try:
                assert await store.admit(new) is None
                acknowledged.append(new)
            except RecordsUnavailable:
                failed += 1
                await asyncio.sleep(0.05)

    async def kill() -> None:
        while len(acknowledged) < 20:  # noqa: ASYNC110 - the others' list
            await asyncio.sleep(0.01)
        os.kill(server.pid(), how)

    await asyncio.gather(*(keep_admitting() for _ in range(4)), kill())
    await _answers(pool)
    assert failed > 0
    assert acknowledged
    for new in acknowledged:
        image = await store.sealed_image(new.lesion_id, new.image_id)
        assert image.sealed == new.sealed
        assert await store.assessment_record(new.assessment_id) is not None


async def test_a_killed_session_is_replaced(doomed) -> None:
    server, _urls, pool = doomed
    for session in psutil.Process(server.pid()).children():
        if "derm_app" in " ".join(session.cmdline()):
            session.send_signal(signal.SIGTERM)
    await _answers(pool)


async def test_slow_statements_and_full_pools_end_in_time(doomed) -> None:
    pool = doomed[2]
    await _answers(pool)
    started = time.monotonic()
    calls = (pool.fetchval("SELECT pg_sleep(30)") for _ in range(8))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, RecordsUnavailable) for result in results)
    assert time.monotonic() - started < 8
    await _answers(pool)


async def test_a_stopped_server_is_unavailable_not_a_crash(doomed) -> None:
    server, urls, pool = doomed
    postmaster = psutil.Process(server.pid())
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        process.suspend()
    try:
        with pytest.raises(RecordsUnavailable):
            await pool.fetchval("SELECT 1")
        with pytest.raises(RecordsUnavailable):
            await open_pool(urls.app, timeout_s=0.5)
    finally:
        for process in processes:
            process.resume()
    await _answers(pool)


async def test_wrong_addresses_and_passwords_are_unavailable(database) -> None:
    wrong = database.app.replace("//derm_app:", "//derm_app:wrong")
    for url in (wrong, "postgresql://derm_app@127.0.0.1:1/derm", "postgresql:///derm?host=/nowhere"):
        with pytest.raises(RecordsUnavailable):
            await open_pool(url, timeout_s=2)


async def test_closing_does_not_wait_for_ever(database) -> None:
    pool = await open_pool(database.app, timeout_s=0.5)
    async with pool.connection() as connection:
        assert await connection.fetchval("SELECT 1") == 1
        closing = asyncio.create_task(pool.close())
        await asyncio.wait_for(closing, 5)
    with pytest.raises(RecordsUnavailable):
        await pool.fetchval("SELECT 1")
