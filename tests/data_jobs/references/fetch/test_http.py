from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
import threading
import time

import pytest

from data_jobs.references.fetch.http import Pace, Stopped, Transient, retry_after_s

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("120", 120),
        ("Tue, 24 Nov 2026 12:01:30 GMT", 90),
        ("Tue, 24 Nov 2026 11:00:00 GMT", 0),
        ("soon", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(header, seconds):
    assert retry_after_s(header, NOW) == seconds


def test_a_server_that_asks_to_be_left_alone_is_left_alone_by_all_threads(pace):
    with pytest.raises(Transient):
        pace.retry(_failing(wait_s=0.3), attempts=1)
    started = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        waited = pool.map(lambda _: pace.retry(lambda: time.monotonic() - started, 1), range(3))
    assert min(waited) >= 0.25


def test_no_server_can_ask_for_more_than_the_longest_wait():
    pace = Pace(first_s=0.01, longest_asked_s=0.1)
    with pytest.raises(Transient):
        pace.retry(_failing(wait_s=1e9), attempts=2)


def test_a_wait_ends_when_told_to_stop():
    pace = Pace(longest_asked_s=60)
    threading.Timer(0.1, pace.stop).start()
    with pytest.raises(Stopped):
        pace.retry(_failing(wait_s=60), attempts=2)


def _failing(wait_s):
    def attempt():
        raise Transient("wait", wait_s=wait_s)

    return attempt
