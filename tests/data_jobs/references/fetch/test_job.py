"""The command line from end to end, against the server that stands in for the archive."""

from __future__ import annotations

import csv
import hashlib
from http.server import BaseHTTPRequestHandler
import json
import os
import signal
import subprocess
import sys

import pytest

from data_jobs.references.catalogue import read_catalogue
from data_jobs.references.fetch import __main__ as command
from data_jobs.references.fetch.http import Pace
from data_jobs.references.fetch.job import only_one
from tests.data_jobs.references.conftest import reference_image
from tests.http_server import serving
from tests.waiting import until


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(command, "Pace", lambda: Pace(first_s=0.01, longest_s=0.1))


@pytest.fixture
def filled(archive_server, new_image):
    """57 naevi, 15 melanomas, 3 dermatofibromas; and what is left out."""
    archive_server.page = 20
    for number in range(75):
        diagnosis = "DF" if number % 25 == 7 else "MEL" if number % 5 == 3 else "NV"
        archive_server.add(new_image(number, diagnosis))
    archive_server.add(
        new_image(80, image_type="clinical: overview"),
        new_image(81, "cyst"),
        new_image(82, diagnosis_confirm_type=None),
        new_image(83, attribution=""),
        new_image(84, copyright_license="CC-BY-NC"),
    )
    return archive_server


@pytest.fixture
def run(filled, tmp_path, capsys):
    def run(*arguments, source="archive", count=30, output=tmp_path / "out"):
        url = {"archive": filled.api, "bucket": filled.bucket, "folder": ""}[source]
        asked = ["--source", source, "--url", url, "--output", str(output), "--count", str(count)]
        asked += ["--folder", str(tmp_path / "all")]
        status = command.main([*asked, "--threads", "4", "--licence", "cc-0,cc-by", *arguments])
        return status, capsys.readouterr()

    return run


def check_folder(output, filled, *, count):
    entries = read_catalogue(output)
    assert len(entries) == count
    assert sorted(path.name for path in (output / "images").iterdir()) == [
        f"{entry.isic_id}.jpg" for entry in entries
    ]
    for entry in entries:
        data = (output / entry.path).read_bytes()
        assert data == filled.files[entry.isic_id]
        assert entry.bytes == len(data)
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
    return entries


def test_a_folder_is_filled_with_what_a_reference_needs_the_same_from_each_source(run, filled, tmp_path):
    chosen = {}
    for source in ("archive", "bucket", "folder"):
        status, said = run(source=source, output=tmp_path / source)
        assert status == 0
        entries = check_folder(tmp_path / source, filled, count=30)
        assert {entry.source for entry in entries} == {source}
        chosen[source] = [entry.isic_id for entry in entries]
        if source == "bucket":
            for cause in (
                "diagnosis not confirmed",
                "diagnosis of none of the eight classes",
                "not dermoscopic",
            ):
                assert f"1 {cause}" in said.out
            run(count=500, output=tmp_path / "all")
    assert chosen["archive"] == chosen["bucket"] == chosen["folder"]
    assert {entry.copyright_license for entry in entries} == {"CC-0", "CC-BY"}
    for entry in entries:
        reference_image(entry)
    assert "30 of 30 images are here, 30 fetched now" in said.out


def test_run_again_it_fetches_what_is_missing_however_the_archive_has_grown(run, filled, tmp_path, new_image):
    run()
    (tmp_path / "out" / "images" / read_catalogue(tmp_path / "out")[4].path.split("/")[1]).unlink()
    filled.add(*(new_image(number) for number in range(200, 260)))
    filled.seen.clear()
    status, said = run()
    assert status == 0
    assert "30 of 30 images are here, 1 fetched now" in said.out
    assert len(filled.seen) == 2  # where the image is, and the image
    check_folder(tmp_path / "out", filled, count=30)


def test_a_failed_image_is_told_and_fetched_the_next_time(run, filled, tmp_path):
    broken = "ISIC_0000007"  # one of three dermatofibromas, which are all chosen
    filled.always[f"/files/{broken}"] = 404
    status, said = run()
    assert status == 1
    assert "29 of 30 images are here" in said.out
    assert "1 failed, see failures.csv; run this again" in said.out
    with (tmp_path / "out" / "failures.csv").open(newline="") as file:
        assert [(row["isic_id"], row["cause"]) for row in csv.DictReader(file)] == [(broken, "gone")]
    check_folder(tmp_path / "out", filled, count=29)
    filled.always.clear()
    status, said = run()
    assert status == 0
    assert "30 of 30 images are here, 1 fetched now" in said.out
    assert not (tmp_path / "out" / "failures.csv").exists()
    check_folder(tmp_path / "out", filled, count=30)


def test_a_listing_that_broke_off_goes_on_where_it_was_or_is_begun_anew(run, filled, tmp_path):
    assert run(output=tmp_path / "whole")[0] == 0
    whole = read_catalogue(tmp_path / "whole")
    for damage in ("none", "torn", "unknown cursor", "other options", "nonsense"):
        output = tmp_path / damage
        # The first page is there, the second is not to be had.
        filled.fail("cursor=", *[503] * 8)
        status, said = run("--seed", "5" if damage == "other options" else "0", output=output)
        assert status == 1
        assert "answered 503" in said.err
        journal = output / "listing.jsonl"
        lines = journal.read_text().splitlines(keepends=True)
        if damage == "torn":
            journal.write_text("".join(lines) + lines[-1][:100])
        elif damage == "unknown cursor":
            page = json.loads(lines[-1]) | {"cursor": "query=image_type%3Adermoscopic&cursor=bm9uc2Vuc2U%3D"}
            journal.write_text(lines[0] + json.dumps(page) + "\n")
        elif damage == "nonsense":
            journal.write_text(lines[0] + "{}\n")
        filled.seen.clear()
        assert run(output=output)[0] == 0
        anew = [path for path in filled.paths("/search/") if "cursor=" not in path]
        assert len(anew) == (damage not in {"none", "torn"})
        assert read_catalogue(output) == whole


def test_a_folder_begun_with_other_options_is_left_alone(run, tmp_path):
    run()
    status, said = run("--seed", "9", count=40)
    assert status == 1
    assert "was begun with other options (count was 30, is 40; seed was 0, is 9)" in said.err
    assert len(read_catalogue(tmp_path / "out")) == 30


def test_two_fetches_do_not_share_a_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    with only_one(tmp_path / "out"):
        status, said = run()
    assert status == 1
    assert "Another fetch is at work" in said.err


def test_no_candidate_at_all_says_why(run):
    status, said = run("--exclude", "/dev/null", "--query", "diagnosis_2:Cysts")
    assert status == 1
    assert "None of 1 images can be a reference (diagnosis of none of the eight classes: 1)" in said.err


def test_excluded_images_and_lesions_stay_out_and_fewer_than_asked_for_is_no_failure(run, filled, tmp_path):
    out = tmp_path / "exclude.txt"
    out.write_text("ISIC_0000000\nIL_0000001\n")
    status, said = run("--exclude", str(out), count=500)
    assert status == 0
    assert "48 of 48 images are here" in said.out
    assert not {"ISIC_0000000", "ISIC_0000001"} & {
        entry.isic_id for entry in read_catalogue(tmp_path / "out")
    }


def test_too_little_space_is_told_before_anything_is_fetched(run, filled, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100_000_000}))
    status, said = run()
    assert status == 1
    assert "has 0.1 GB. Make room, name another --output, or a smaller --count." in said.err
    assert filled.paths("/files/") == []


def test_wrong_use_is_status_2(capsys):
    for source, *options in (("folder",), ("archive", "--count", "0"), ("archive", "--licence", "gpl")):
        with pytest.raises(SystemExit) as ended:
            command.main(["--source", source, "--output", "x", "--count", "3", *options])
        assert ended.value.code == 2


def test_an_interrupted_fetch_goes_on_when_run_again(run, filled, tmp_path):
    filled.delay_s = 0.1
    output = tmp_path / "out"
    asked = ["--source", "archive", "--url", filled.api, "--output", str(output), "--count", "30"]
    asked += ["--threads", "4", "--licence", "cc-0,cc-by"]
    fetch = subprocess.Popen(
        [sys.executable, "-m", "data_jobs.references.fetch", *asked],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert until(lambda: len(filled.paths("/files/")) >= 8, 60)
    fetch.send_signal(signal.SIGTERM)
    _, said = fetch.communicate(timeout=30)
    assert fetch.returncode == 130
    assert said.decode().splitlines()[-1] == "interrupted; run this again with the same options to go on"
    whole = list((output / "images").iterdir())
    assert 0 < len(whole) < 30
    assert all(file.read_bytes() == filled.files[file.stem] for file in whole)
    assert not (output / "metadata.parquet").exists()
    filled.delay_s = 0
    status, again = run()
    assert status == 0
    assert f"30 of 30 images are here, {30 - len(whole)} fetched now" in again.out
    check_folder(output, filled, count=30)


def test_an_image_that_leads_to_a_port_of_this_machine_is_not_fetched_from_there(run, filled, tmp_path):
    seen = []

    class Inner(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(filled.files["ISIC_0000007"])

    with serving(Inner) as port:
        filled.always["/files/ISIC_0000007"] = f"http://127.0.0.1:{port}/secret.jpg"
        status, _ = run()
    assert status == 1
    assert seen == []
    with (tmp_path / "out" / "failures.csv").open(newline="") as file:
        assert [row["cause"] for row in csv.DictReader(file)] == ["insecure place"]


def test_a_run_downloads_no_more_than_it_may_and_the_next_goes_on(run, filled, tmp_path):
    status, said = run("--max-gb", "0.0001")
    assert status == 1
    assert "All downloads together have more than 100000 bytes. Run this again to go on" in said.err
    status, said = run()
    assert status == 0
    check_folder(tmp_path / "out", filled, count=30)
