"""A few rounds of the faults that need no Ray; `python -m benchmarks.faults` runs hundreds.

The replicas and PostgreSQL killed under Ray are in tests/end_to_end/test_kill.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
import shutil

import pytest

from benchmarks.faults import (
    WHOLE_S,
    NoSmallDisk,
    Outcome,
    full_disk,
    lost_keys,
    lost_statements,
    own_database,
    report_kind,
    small_disk,
)
from benchmarks.faults_load import LocalService, local_service, new_home

CONCURRENCY = 3


@pytest.fixture(scope="module")
async def service(new_database) -> AsyncIterator[LocalService]:
    """The application on a database of its own."""
    urls = await new_database()
    home = new_home("derm-test-")
    try:
        async with local_service(home, urls) as service:
            yield service
    finally:
        shutil.rmtree(home)


def hold_to_promises(outcome: Outcome, capsys) -> dict[str, object]:
    report = report_kind(outcome)
    with capsys.disabled():
        print(f"\n{outcome.kind}: {report}")
    assert outcome.account.lost == []
    assert outcome.account.doubled == []
    assert outcome.account.untyped == []
    assert outcome.account.acknowledged > 0
    assert max(outcome.recoveries_s) < WHOLE_S
    assert report["kept"]
    return report


async def test_the_nth_statement_lost(service, capsys) -> None:
    outcome = Outcome("query")
    await lost_statements(outcome, 8, CONCURRENCY, service)
    report = hold_to_promises(outcome, capsys)
    assert report["struck"] == outcome.rounds == 8
    assert report["statements"] >= 4 * CONCURRENCY


async def test_the_keys_away(service, capsys) -> None:
    outcome = Outcome("keys")
    await lost_keys(outcome, 2, CONCURRENCY, service)
    report = hold_to_promises(outcome, capsys)
    # Both faults were felt, neither let an image in unsealed, and each said that trying again helps.
    felt = {answer for answer in report["answers"] if answer[0] == "5"}
    assert felt == {"503 key_provider_unavailable", "503 records_unavailable"}


async def test_a_full_disk(capsys) -> None:
    outcome = Outcome("disk")
    try:
        with small_disk() as disk:
            async with own_database(disk) as (home, urls), local_service(home, urls) as service:
                await full_disk(outcome, 1, CONCURRENCY, service, disk)
    except NoSmallDisk as missing:
        pytest.skip(str(missing))
    report = hold_to_promises(outcome, capsys)
    assert any(answer.startswith("503 ") for answer in report["answers"]), report
