from __future__ import annotations

import csv
import os

import pytest

from data_jobs.references.catalogue import CatalogueEntry, write_catalogue
from data_jobs.references.fetch import sources
from data_jobs.references.fetch.eligibility import Eligibility, LeftOut
from data_jobs.references.fetch.http import FetchError, Http, Refused
from data_jobs.references.fetch.sources import Archive, Folder, flatten
from serve_app.domain.diagnosis import Diagnosis


def ids(pages):
    return [record["isic_id"] for page in pages for record in page.records]


@pytest.fixture
def filled(archive_server, new_image):
    archive_server.add(*(new_image(number) for number in range(25)))
    archive_server.page = 10
    return archive_server


def test_every_page_is_read_although_next_names_another_host_and_any_can_be_the_first(filled, archive):
    pages = list(archive.pages(None))
    assert ids(pages) == list(filled.images)
    assert [bool(page.cursor) for page in pages] == [True, True, False]
    assert [page.total for page in pages] == [25, None, None]
    assert filled.paths("query=image_type%3Adermoscopic")[0].startswith("/api/v2/images/search/")
    assert ids(archive.pages(pages[0].cursor)) == list(filled.images)[10:]


def test_a_query_narrows_the_search(filled, pace, new_image):
    filled.add(new_image(99, image_type="clinical: close-up"))
    with Http(filled.api, pace) as http:
        asked = "image_type:dermoscopic AND sex:female"
        found = list(Archive(http, base=filled.api, query=asked, collections="65,97").pages(None))
    assert 0 < len(ids(found)) < 25
    assert "collections=65%2C97" in filled.paths()[0]


def test_a_search_that_runs_in_a_circle_is_noticed(filled, pace, monkeypatch):
    page = {"results": [], "next": "https://x/?cursor=a", "count": 1}
    monkeypatch.setattr(filled, "search", lambda *_: (200, page))
    with Http(filled.api, pace) as http, pytest.raises(FetchError, match="follows itself"):
        list(Archive(http, base=filled.api).pages(None))


def test_an_image_withdrawn_since_the_listing_is_refused(filled, archive):
    assert archive.read("ISIC_0000003") == filled.files["ISIC_0000003"]
    filled.images["ISIC_0000003"]["public"] = None
    with pytest.raises(Refused, match="not public any more"):
        archive.read("ISIC_0000003")


@pytest.mark.parametrize("url", ["file:///etc/passwd", None, "ftp://example.org/x.jpg"])
def test_a_file_is_only_fetched_from_where_the_archive_itself_could_be(filled, archive, url, monkeypatch):
    answer = {**filled.images["ISIC_0000003"], "files": {"full": {"url": url, "size": 3}}}
    monkeypatch.setattr(filled, "image", lambda _: answer)
    with pytest.raises(Refused):
        archive.read("ISIC_0000003")


def test_what_an_image_lacks_is_not_there():
    lacking = dict.fromkeys(("isic_id", "copyright_license", "attribution", "public", "bytes"))
    for image in ({}, {"metadata": None, "files": 3}, {"metadata": {"clinical": []}, "files": {}}):
        assert flatten(image) == lacking


@pytest.fixture
def published(archive_server, new_image):
    archive_server.add(*(new_image(number, attribution=f"Ärzte, {number}") for number in range(40)))
    archive_server.add(new_image(77, image_type=None, sex=None), data=b"")
    return archive_server


def records(bucket):
    return [record for page in bucket.pages(None) for record in page.records]


def test_the_snapshots_metadata_is_read_without_the_images_although_requests_fail(published, bucket):
    published.fail("/snapshots/ISIC_images.zip", 503, "cut", "reset")
    found = records(bucket)
    assert [record["isic_id"] for record in found] == list(published.images)
    assert found[3]["attribution"] == "Ärzte, 3"
    assert found[3]["diagnosis_3"] == "Nevus"
    assert all(record["bytes"] == len(published.files[record["isic_id"]]) for record in found)
    assert found[-1]["sex"] == ""
    assert published.paths("/bucket/images/") == []
    assert bucket.read("ISIC_0000003") == published.files["ISIC_0000003"]
    assert published.paths()[-1] == "/bucket/images/ISIC_0000003.jpg"
    published.files["ISIC_0000003"] = bytes(21 * 1024 * 1024)
    with pytest.raises(Refused, match="is larger than 20971520 bytes"):
        bucket.read("ISIC_0000003")


def test_a_snapshot_replaced_while_it_is_read_is_noticed(published, bucket, new_image, monkeypatch):
    # More than is read at once.
    published.add(*(new_image(number) for number in range(1000, 2500)), data=b"x")
    get = type(bucket._http).get

    def replace_afterwards(http, url, **options):
        found = get(http, url, **options)
        published.add(new_image(900))
        return found

    monkeypatch.setattr(type(bucket._http), "get", replace_afterwards)
    with pytest.raises(FetchError, match="was replaced while it was read"):
        records(bucket)


def test_a_server_that_knows_no_ranges_is_named(published, bucket):
    published.always["/snapshots/"] = "whole"
    with pytest.raises(Refused, match="serves no ranges"):
        records(bucket)


def test_metadata_that_unpack_without_measure_are_not_read(published, bucket, monkeypatch):
    monkeypatch.setattr(sources, "_METADATA_BYTES", 1000)
    with pytest.raises(FetchError, match=r"metadata.csv of .* is larger than 1000 bytes"):
        records(bucket)


def judged(folder):
    pages = list(Folder(folder).pages(None))
    return [Eligibility().judge(record, source="folder") for record in pages[0].records]


def read(folder, isic_id):
    source = Folder(folder)
    list(source.pages(None))
    return source.read(isic_id)


def test_what_isic_cli_leaves_is_read_as_it_is(tmp_path, new_image, new_jpeg):
    """The images beside metadata.csv, with the archive's columns; one that is not there fails when it is fetched."""
    rows = [flatten(new_image(number, "MEL" if number % 2 else "cyst")) for number in range(4)]
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows[:3]:
        (tmp_path / f"{row['isic_id']}.jpg").write_bytes(new_jpeg(int(row["isic_id"][5:])))
    entries = judged(tmp_path)
    assert entries[0] is LeftOut.OTHER_DIAGNOSIS
    assert entries[1].diagnosis is Diagnosis.MEL
    assert (entries[1].bytes, entries[3].bytes) == (len(new_jpeg(1)), None)
    assert read(tmp_path, "ISIC_0000001") == new_jpeg(1)
    with pytest.raises(Refused, match="has no image of ISIC_0000003"):
        read(tmp_path, "ISIC_0000003")


def test_a_catalogue_of_ours_is_read_with_its_paths(tmp_path, new_jpeg):
    entry = CatalogueEntry(
        isic_id="ISIC_0000001",
        diagnosis=Diagnosis.DF,
        diagnosis_confirm_type="histo",
        copyright_license="CC-BY",
        attribution="Someone",
        path="elsewhere/one.jpeg",
    )
    write_catalogue(tmp_path, [entry])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "one.jpeg").write_bytes(new_jpeg(1))
    assert judged(tmp_path)[0].path == "images/ISIC_0000001.jpg"
    assert read(tmp_path, "ISIC_0000001") == new_jpeg(1)


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/hostname", "link.jpg"])
def test_no_path_leads_out_of_the_folder(tmp_path, path, new_jpeg):
    (tmp_path / "secret.jpg").write_bytes(new_jpeg(1))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    header = "isic_id,diagnosis,copyright_license,attribution,path\n"
    (folder / "metadata.csv").write_text(f"{header}ISIC_0000001,NV,CC-0,Someone,{path}\n")
    with pytest.raises(Refused, match="has no image"):
        read(folder, "ISIC_0000001")


def test_what_is_no_listing_is_named(filled, archive, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(filled, "search", lambda *_: (200, {"items": []}))
    with pytest.raises(FetchError, match="no page of images"):
        list(archive.pages(None))
    monkeypatch.setattr(filled, "snapshot", lambda: b"<html>" * 1000)
    with pytest.raises(FetchError, match=r"ISIC_images\.zip is no snapshot of the archive"):
        records(bucket)
    (tmp_path / "metadata.parquet").write_bytes(os.urandom(100))
    with pytest.raises(FetchError, match="can not be read"):
        list(Folder(tmp_path).pages(None))
    filled.images["ISIC_0000003"]["files"] = None
    monkeypatch.setattr(filled, "image", lambda isic_id: filled.images[isic_id])
    with pytest.raises(Refused, match="names no file for ISIC_0000003"):
        archive.read("ISIC_0000003")
