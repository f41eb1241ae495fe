from __future__ import annotations

import csv
import os

import pytest

from data_jobs.references.catalogue import CatalogueEntry, write_catalogue
from data_jobs.references.fetch.archive import flatten
from data_jobs.references.fetch.eligibility import Eligibility, LeftOut
from data_jobs.references.fetch.errors import FetchError, Refused
from data_jobs.references.fetch.folder import Folder
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import NotFound


def judged(folder):
    pages = list(Folder(folder).pages(None))
    return [Eligibility().judge(record, source="folder") for record in pages[0].records]


def read(folder, isic_id):
    source = Folder(folder)
    list(source.pages(None))
    with source.open(isic_id) as body:
        data = b"".join(body.chunks)
    assert body.length == len(data)
    return data


@pytest.fixture
def from_isic_cli(tmp_path, new_image, new_jpeg):
    """What `isic image download` leaves: the images beside metadata.csv, with the archive's columns."""
    rows = [flatten(new_image(number, "MEL" if number % 2 else "cyst")) for number in range(6)]
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows[:5]:
        (tmp_path / f"{row['isic_id']}.jpg").write_bytes(new_jpeg(int(row["isic_id"][5:])))
    return tmp_path


def test_what_isic_cli_leaves_is_read_as_it_is(from_isic_cli, new_jpeg):
    entries = judged(from_isic_cli)
    assert entries[0] is LeftOut.OTHER_DIAGNOSIS
    assert entries[1].diagnosis is Diagnosis.MEL
    assert entries[1].bytes == len(new_jpeg(1))
    assert read(from_isic_cli, "ISIC_0000001") == new_jpeg(1)


def test_an_image_that_is_not_there_is_a_candidate_and_fails_when_fetched(from_isic_cli):
    assert judged(from_isic_cli)[5].bytes is None
    with pytest.raises(Refused, match="has no image of ISIC_0000005"):
        read(from_isic_cli, "ISIC_0000005")


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


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"has none of metadata\.parquet, metadata\.csv, train\.csv"):
        list(Folder(tmp_path).pages(None))


def test_metadata_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "metadata.parquet").write_bytes(os.urandom(100))
    with pytest.raises(FetchError, match="can not be read"):
        list(Folder(tmp_path).pages(None))


def test_the_labelled_archive_is_read(isic_dir):
    entries = judged(isic_dir)
    assert len(entries) > 10_000
    left_out = {entry for entry in entries if isinstance(entry, LeftOut)}
    assert left_out <= {LeftOut.UNCONFIRMED}
