from __future__ import annotations

import io

import pytest

from data_jobs.references.fetch.errors import FetchError, Refused
from data_jobs.references.fetch.remote_file import RemoteFile

SNAPSHOT = "/snapshots/ISIC_images.zip"


@pytest.fixture
def filled(archive_server, new_image):
    archive_server.add(*(new_image(number, attribution=f"Ärzte, {number}") for number in range(40)))
    archive_server.add(new_image(77, image_type=None, sex=None), data=b"")
    return archive_server


def records(bucket):
    return [record for page in bucket.pages(None) for record in page.records]


def test_the_snapshots_metadata_is_read_without_the_images(filled, bucket):
    found = records(bucket)
    assert [record["isic_id"] for record in found] == list(filled.images)
    assert found[3]["attribution"] == "Ärzte, 3"
    assert found[3]["diagnosis_3"] == "Nevus"
    assert all(record["bytes"] == len(filled.files[record["isic_id"]]) for record in found)
    assert found[-1]["sex"] == ""
    assert filled.paths("/bucket/images/") == []


def test_a_snapshot_is_read_although_requests_fail(filled, bucket, new_fault):
    filled.fail(SNAPSHOT, new_fault(status=503), new_fault(body="cut"), new_fault(body="reset"))
    assert len(records(bucket)) == 41


def test_a_snapshot_replaced_while_it_is_read_is_noticed(filled, pace, bucket, new_image):
    remote = RemoteFile(bucket._http, "snapshots/ISIC_images.zip")
    filled.add(new_image(900))
    with pytest.raises(FetchError, match="was replaced while it was read"):
        remote.read(10)


def test_a_remote_file_reads_as_a_local_one(filled, bucket):
    local = io.BytesIO(filled.snapshot())
    remote = io.BufferedReader(RemoteFile(bucket._http, "snapshots/ISIC_images.zip"), 1000)
    for offset, whence in ((0, 0), (-22, 2), (1500, 0), (200, 1), (10, 2), (5, 0)):
        assert remote.seek(offset, whence) == local.seek(offset, whence)
        assert remote.read(300) == local.read(300)
    local.seek(0)
    remote.seek(0)
    assert remote.read() == local.read()


def test_what_is_no_snapshot_is_named(filled, bucket, monkeypatch):
    monkeypatch.setattr(filled, "snapshot", lambda: b"<html>" * 1000)
    with pytest.raises(FetchError, match=r"ISIC_images\.zip is no snapshot of the archive"):
        records(bucket)


def test_a_bucket_without_a_snapshot_is_named(filled, bucket, new_fault):
    filled.always[SNAPSHOT] = new_fault(status=404)
    with pytest.raises(Refused, match="answered 404"):
        records(bucket)


def test_a_server_that_knows_no_ranges_is_named(filled, bucket, monkeypatch):
    handler = bucket._http
    monkeypatch.setattr(type(handler), "get", lambda self, url, **_: self._client.get(url))
    with pytest.raises(Refused, match="serves no ranges"):
        records(bucket)


def test_an_image_is_its_own_object(filled, bucket):
    with bucket.open("ISIC_0000003") as body:
        assert b"".join(body.chunks) == filled.files["ISIC_0000003"]
    assert filled.paths()[-1] == "/bucket/images/ISIC_0000003.jpg"
