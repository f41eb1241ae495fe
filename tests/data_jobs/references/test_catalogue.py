from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_jobs.references.catalogue import (
    CatalogueEntry,
    read_catalogue,
    read_references,
    write_catalogue,
)
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Conflict, NotFound

FULL = CatalogueEntry(
    isic_id="ISIC_0000001",
    lesion_id="IL_0000001",
    patient_id="IP_0000001",
    diagnosis=Diagnosis.MEL,
    diagnosis_confirm_type="histo",
    age_approx=55,
    sex="female",
    anatom_site_general="head/neck",
    fitzpatrick_skin_type="IV",
    copyright_license="CC-BY",
    attribution="Hôpital, “Nord”",
    source="archive",
    path="images/ISIC_0000001.jpg",
    bytes=12345,
    sha256="ab" * 32,
)
BARE = CatalogueEntry(
    isic_id="ISIC_0000002",
    diagnosis=Diagnosis.NV,
    copyright_license="CC-0",
    attribution="Someone",
    path="images/ISIC_0000002.jpg",
)
HEADER = "isic_id,diagnosis,copyright_license,attribution"


def csv_folder(folder: Path, *rows: str, header: str = HEADER) -> Path:
    (folder / "metadata.csv").write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return folder


def test_what_is_written_is_read_ordered_by_id(tmp_path):
    write_catalogue(tmp_path, [BARE, FULL])
    assert read_catalogue(tmp_path) == [FULL, BARE]
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.parquet"]
    assert pq.read_schema(tmp_path / "metadata.parquet").field("bytes").type == "int64"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",NV,CC-0,Someone,", "no isic_id"),
        ("ISIC_0000002,,CC-0,Someone,", "no diagnosis"),
        ("ISIC_0000002,NV,,Someone,", "no copyright_license"),
        ("ISIC_0000002,NV,CC-0,,", "no attribution"),
        ("ISIC_0000002,UNK,CC-0,Someone,", "UNK is the diagnosis of no reference"),
        ("ISIC_0000002,wart,CC-0,Someone,", "row 1: 'wart' is not a valid Diagnosis"),
        ("ISIC_0000002,NV,all rights reserved,x", "row 1: 'all rights reserved' is no licence"),
        ("ISIC_0000002,NV,CC-BY-SA,Someone,", "'CC-BY-SA' is no licence of a reference; those are CC-0, CC"),
        ("ISIC_0000002,NV,CC-BY-NC-ND 4.0,Someone,", "is no licence of a reference"),
        ("../../2,NV,CC-0,Someone,", "is no isic_id"),
        ("ISIC_0000002,NV,CC-0,Someone,../x.jpg", "leads out of the folder"),
        ("ISIC_0000002,NV,CC-0,Someone,/x.jpg", "leads out of the folder"),
        ("ISIC_0000002,NV,CC-0,Someone,,abc", "is no SHA-256"),
        ("ISIC_0000002,NV,CC-0,Someone,,,False", "row 1: public is 'False'; only a public image"),
        ("ISIC_0000002,NV,CC-0,Someone,,,no", "row 1: public is 'no'; only a public image"),
    ],
)
def test_a_row_that_is_no_reference_is_refused_by_name(tmp_path, row, message):
    csv_folder(tmp_path, row, header=f"{HEADER},path,sha256,public")
    with pytest.raises(Conflict, match=message):
        read_catalogue(tmp_path)


def test_what_other_tools_write_is_understood_and_parquet_goes_before_csv(tmp_path):
    said = ("True", "1", "")
    rows = (f"ISIC_000000{n},NV,CC BY-NC 4.0,Someone,{public},55.0" for n, public in enumerate(said))
    csv_folder(tmp_path, *rows, header=f"{HEADER},public,age_approx")
    assert {(one.copyright_license, one.age_approx) for one in read_catalogue(tmp_path)} == {("CC-BY-NC", 55)}
    write_catalogue(tmp_path, [BARE])
    assert read_catalogue(tmp_path) == [BARE]


def test_only_dermoscopic_images_are_references(tmp_path):
    write_catalogue(tmp_path, [FULL, replace(BARE, image_type="clinical: overview")])
    assert read_references(tmp_path) == [FULL]


def test_an_image_is_there_once(tmp_path):
    csv_folder(tmp_path, *["ISIC_0000002,NV,CC-0,Someone"] * 2)
    with pytest.raises(Conflict, match="has ISIC_0000002 twice"):
        read_catalogue(tmp_path)


def test_a_folder_without_metadata_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"none of metadata\.parquet, metadata\.csv, train\.csv"):
        read_catalogue(tmp_path)
