"""The loops beside answering: one that ends is started again and shown, and a shutdown has its end."""

from __future__ import annotations

import asyncio
from itertools import pairwise
import time

import pytest

from serve_app import worker
from serve_app.domain.errors import RecordsUnavailable
from serve_app.worker import KEEPS_ENDING_AFTER, Worker, every
from tests.serve_app.conftest import until


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FIRST_PAUSE_S", 0.01)


async def for_ever() -> None:
    await asyncio.Event().wait()


async def cancelled_within() -> None:
    raise asyncio.CancelledError


async def defective() -> None:
    raise KeyError("secret")


async def returns() -> None:
    return


@pytest.mark.parametrize(
    ("ends", "error"), [(defective, "KeyError"), (returns, "returned"), (cancelled_within, "CancelledError")]
)
async def test_a_loop_that_ends_is_started_again_and_shown(ends, error: str, caplog) -> None:
    started = 0

    async def once_then_for_ever() -> None:
        nonlocal started
        started += 1
        await (ends() if started == 1 else for_ever())

    working, loops = Worker(), {"faulty": once_then_for_ever, "sound": for_ever}
    async with working.running(loops):
        await until(lambda: working.describe()["faulty"]["restarts"])
        assert working.describe() == {
            "faulty": {"running": True, "restarts": 1, "last_error": error},
            "sound": {"running": True, "restarts": 0, "last_error": None},
        }
        assert working.findings() == []
    assert f"The loop faulty ended ({error})" in caplog.text
    assert "secret" not in caplog.text
    assert not any(loop["running"] for loop in working.describe().values())


async def test_one_that_keeps_ending_is_a_finding_and_its_pause_grows(monkeypatch) -> None:
    monkeypatch.setattr(worker, "LONGEST_PAUSE_S", 0.05)
    starts: list[float] = []

    async def keeps_ending() -> None:
        starts.append(time.monotonic())
        raise ValueError

    working, loops = Worker(), {"faulty": keeps_ending, "sound": for_ever}
    async with working.running(loops):
        await until(lambda: len(starts) > KEEPS_ENDING_AFTER + 3)
        assert working.findings() == ["the loop faulty keeps ending: ValueError"]
        assert working.describe()["sound"]["running"]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[0] < pauses[2]
    assert pauses[-1] >= 0.05
    monkeypatch.setattr(worker, "STEADY_S", 0.0)
    starts.clear()
    async with working.running(loops):
        await until(lambda: len(starts) > 1)
        assert working.findings() == []


async def test_a_shutdown_waits_for_the_last_act_and_not_for_ever(monkeypatch, caplog) -> None:
    monkeypatch.setattr(worker, "STOP_WITHIN_S", 0.2)
    over, done = asyncio.Event(), []

    async def hangs() -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    async def last() -> None:
        done.append("last")

    since = time.monotonic()
    loops = {"hangs": hangs, "rounds": every(60, for_ever, last=last), "fails": every(60, last=defective)}
    async with Worker().running(loops):
        await asyncio.sleep(0.01)
    assert time.monotonic() - since < 5
    assert done == ["last"]
    assert "Not stopped in time: hangs" in caplog.text
    assert "fails: its last act failed (KeyError)" in caplog.text
    assert "secret" not in caplog.text
    over.set()


async def test_of_a_round_what_fails_holds_up_no_other_piece() -> None:
    done: list[str] = []

    async def unavailable() -> None:
        raise RecordsUnavailable

    async def works() -> None:
        done.append("works")

    working = Worker()
    loops = {
        "waits": every(0.01, unavailable, for_ever, works, within_s=0.01),
        "defective": every(0.01, defective, works),
    }
    async with working.running(loops):
        await until(lambda: len(done) >= 4 and working.describe()["defective"]["restarts"])
        assert working.describe()["waits"] == {"running": True, "restarts": 0, "last_error": None}
        assert working.describe()["defective"]["last_error"] == "KeyError"
