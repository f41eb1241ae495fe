from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
import threading
import time

import httpx
import pytest

from data_jobs.references.fetch import http
from data_jobs.references.fetch import job as subject
from data_jobs.references.fetch.eligibility import Eligibility
from data_jobs.references.fetch.http import FetchError, Pace, Stopped, Transient, retry_after_s
from data_jobs.references.fetch.job import RESERVE, Download, check_space, stored_images
from data_jobs.references.fetch.sources import Archive, flatten


@pytest.fixture
def output(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path


@pytest.fixture
def entries(archive_server, new_image):
    archive_server.add(*(new_image(number) for number in range(12)))
    return [
        Eligibility().judge(flatten(archive_server.image(isic_id)), source="archive")
        for isic_id in archive_server.images
    ]


@pytest.fixture
def download(archive, output, pace):
    return Download(archive, output, pace)


def names(output):
    return sorted(path.name for path in (output / "images").iterdir())


def whole(output, archive_server, left_out=()):
    assert names(output) == sorted(f"{name}.jpg" for name in archive_server.images if name not in left_out)
    for file in (output / "images").iterdir():
        assert file.read_bytes() == archive_server.files[file.stem]


@pytest.mark.parametrize(
    "fault", [(429, "0"), (503, "Tue, 24 Nov 2026 11:00:00 GMT"), "reset", "garbage"], ids=str
)
def test_a_fault_that_passes_costs_another_attempt(archive_server, entries, download, output, fault):
    archive_server.fail("/files/", *[fault] * 3)
    download.run(entries, threads=3)
    assert download.failed == {}
    whole(output, archive_server)
    assert len(archive_server.paths("/files/")) == 12 + 3


@pytest.mark.parametrize(
    ("fault", "cause", "attempts"),
    [
        (500, "status 500", 6),
        ("cut", "broke off", 6),
        ("short", "wrong length", 6),
        ("garbage", "no whole JPEG", 6),
        # What another attempt would not change.
        (403, "status 403", 1),
        (404, "gone", 1),
    ],
)
def test_a_fault_that_stays_is_that_images_failure_and_no_others(
    archive_server, entries, download, output, fault, cause, attempts
):
    archive_server.always["/files/ISIC_0000005"] = fault
    download.run(entries, threads=3)
    assert {isic_id: error.cause for isic_id, error in download.failed.items()} == {"ISIC_0000005": cause}
    assert len(archive_server.paths("/files/ISIC_0000005")) == attempts
    # The place without the signature.
    assert "signature" not in str(download.failed["ISIC_0000005"])
    whole(output, archive_server, left_out={"ISIC_0000005"})


def test_a_server_that_says_nothing_is_not_waited_for_without_end(
    archive_server, entries, output, pace, monkeypatch
):
    monkeypatch.setattr(http, "_TIMEOUT", httpx.Timeout(0.7))
    archive_server.fail("/files/", "hang")
    archive_server.always["/files/ISIC_0000001"] = "hang"
    with http.Http(archive_server.api, pace) as client:
        source = Archive(client, base=archive_server.api)
        source.attempts = 2
        download = Download(source, output, pace)
        download.run(entries[:2], threads=1)
    assert {isic_id: error.cause for isic_id, error in download.failed.items()} == {"ISIC_0000001": "timeout"}


def test_an_archive_that_is_down_ends_the_run_early(archive_server, entries, download, monkeypatch):
    monkeypatch.setattr(subject, "GIVE_UP_AFTER", 4)
    archive_server.always["/files/"] = 503
    with pytest.raises(FetchError, match=r"does not answer: 4 images in a row failed.*Run this again later"):
        download.run(entries, threads=1)
    assert len(download.failed) == 4


def test_a_disk_that_fills_up_ends_the_run(entries, download, output, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subject, "store_image", full)
    with pytest.raises(OSError, match="No space left"):
        download.run(entries, threads=2)
    assert names(output) == []


def test_what_is_half_done_or_changed_is_not(entries, download, output):
    download.run(entries, threads=3)
    images = output / "images"
    (images / "ISIC_0000001.jpg.partial").write_bytes(b"half")
    flipped = bytearray((images / "ISIC_0000002.jpg").read_bytes())
    flipped[700] ^= 1
    (images / "ISIC_0000002.jpg").write_bytes(flipped)
    cut = images / "ISIC_0000003.jpg"
    cut.write_bytes(cut.read_bytes()[:-1])
    (images / "ISIC_0000004.jpg").unlink()
    again = stored_images(output, threads=2)
    assert sorted({entry.isic_id for entry in entries} - set(again)) == [f"ISIC_000000{n}" for n in (2, 3, 4)]
    assert "ISIC_0000001.jpg.partial" not in names(output)


def test_a_file_that_the_journal_does_not_know_is_not_trusted(entries, download, output):
    download.run(entries, threads=3)
    journal = output / "fetched.csv"
    lines = journal.read_text().splitlines(keepends=True)
    # As a power cut leaves it: the last line torn, and a file whose end never reached the disk.
    journal.write_text("a,b\n\n../../x,12," + "0" * 64 + "\n" + "".join(lines[:-1]) + lines[-1][:40])
    last = output / "images" / f"{lines[-1][:12]}.jpg"
    last.write_bytes(last.read_bytes()[:-200] + bytes(200))
    again = stored_images(output, threads=2)
    assert {entry.isic_id for entry in entries} - set(again) == {last.stem}


def test_space_is_asked_for_with_a_reserve_and_an_unknown_size_counts_as_the_mean_of_the_others(
    new_image, output, monkeypatch
):
    sizes = (1000, 3000, None)
    images = [flatten(new_image(number)) | {"bytes": size} for number, size in enumerate(sizes)]
    entries = [Eligibility().judge(image, source="x") for image in images]
    usage = type("Usage", (), {"free": 6000 + RESERVE})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert check_space(output, entries) == 6000
    usage.free -= 1
    with pytest.raises(
        FetchError, match=r"need .* GB and 0\.5 GB are to stay free, but .* has .* GB\. Make room"
    ):
        check_space(output, entries)
    usage.free = 10**12
    assert (check_space(output, entries[2:]), check_space(output, [])) == (2_000_000, 0)


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
