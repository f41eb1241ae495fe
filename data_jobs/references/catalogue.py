"""A folder of reference images: `images/<isic_id>.jpg`, and `metadata.parquet` that describes them.

`fetch` writes such a folder, the embed job reads it. A hand-made folder may have `metadata.csv` (or the
labelled archive's `train.csv`) instead: the same columns, an empty cell where something is not known.
Those that must be there: isic_id, diagnosis, copyright_license, attribution. Where there is a column `public`,
it must say so of every image that it knows anything of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import csv
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deployments.preprocess.decode import UploadLimits
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import Conflict, InvalidField, NotFound


class Licence(StrEnum):
    """The archive's `copyright_license`. CC-BY and CC-BY-NC demand the attribution; NC forbids commercial use."""

    CC_0 = "CC-0"
    CC_BY = "CC-BY"
    CC_BY_NC = "CC-BY-NC"


_SPELLINGS = {"CC0": Licence.CC_0, "CCBY": Licence.CC_BY, "CCBYNC": Licence.CC_BY_NC}
# "CC BY-NC 4.0", "cc-by", "CC0 1.0 Universal": what is left is letters and the zero of CC-0.
_VERSION = re.compile(r"\b[1-4]\.0\b.*$")


def licence_of(text: str | None) -> Licence | None:
    """The licence that a spelling means; None for any other. CC-BY-SA or -ND are others, not CC-BY."""
    bare = re.sub(r"[^A-Z0-9]", "", _VERSION.sub("", (text or "").upper()))
    return _SPELLINGS.get(bare)


def parse_licences(text: str) -> frozenset[Licence]:
    """Read a list such as `cc-0,cc-by`. Raises InvalidField for a licence that the archive does not use."""
    licences = set()
    for part in filter(None, map(str.strip, text.split(","))):
        licence = licence_of(part)
        if licence is None:
            raise InvalidField(f"{part!r} is none of {', '.join(Licence)}.")
        licences.add(licence)
    if not licences:
        raise InvalidField(f"Name at least one of {', '.join(Licence)}.")
    return frozenset(licences)


METADATA = "metadata.parquet"
IMAGES = "images"
#: The archive's images may be smaller than an upload: their short sides start at 150 pixels.
ARCHIVE_LIMITS = UploadLimits(min_side=32)
#: In the order in which they are looked for.
METADATA_FILES = (METADATA, "metadata.csv", "train.csv")

_ISIC_ID = re.compile(r"ISIC_[0-9]{7,10}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PUBLIC = frozenset({"true", "1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One reference image in the ISIC archive's words; None where the archive does not say."""

    isic_id: str
    lesion_id: str | None = None
    patient_id: str | None = None
    #: One of the eight; an image without such a diagnosis is no reference.
    diagnosis: Diagnosis
    diagnosis_confirm_type: str | None = None
    age_approx: int | None = None
    sex: str | None = None
    anatom_site_general: str | None = None
    fitzpatrick_skin_type: str | None = None
    image_type: str = "dermoscopic"
    #: One of `licences.Licence`, as the archive spells it.
    copyright_license: str
    attribution: str
    #: Where it was fetched from: "archive", "bucket" or "folder".
    source: str = "folder"
    #: The image, relative to the folder.
    path: str
    bytes: int | None = None
    sha256: str | None = None

    @property
    def lesion(self) -> str:
        """The lesion, or the image itself where the archive names none."""
        return self.lesion_id or self.isic_id


SCHEMA = pa.schema(
    [
        pa.field(field.name, pa.int64() if field.name in {"age_approx", "bytes"} else pa.string())
        for field in fields(CatalogueEntry)
    ]
)


def image_path(isic_id: str) -> str:
    """Path of an image within its folder. Raises Conflict unless `isic_id` looks like ISIC_0024306."""
    if not _ISIC_ID.fullmatch(isic_id):
        raise Conflict(f"{isic_id[:40]!r} is no isic_id; they look like ISIC_0024306.")
    return f"{IMAGES}/{isic_id}.jpg"


def read_catalogue(folder: Path, name: str | None = None) -> list[CatalogueEntry]:
    """Read the entries in file order, of the metadata file of that name, or the first that is there.

    Raises NotFound when there is no metadata file, Conflict when a row is no reference: a mandatory
    cell empty, a diagnosis that is none of the eight, a licence that is none of the archive's, an image that
    is not public, a path that leads out of the folder, an id twice.
    """
    file = folder / name if name else metadata_file(folder)
    entries = [_entry(row, f"{file}, row {number}") for number, row in enumerate(metadata_rows(file), 1)]
    seen: set[str] = set()
    for entry in entries:
        if entry.isic_id in seen:
            raise Conflict(f"{file} has {entry.isic_id} twice; each image may be there once.")
        seen.add(entry.isic_id)
    return entries


def read_references(folder: Path) -> list[CatalogueEntry]:
    """Read the entries that become references: the dermoscopic ones. Raises as read_catalogue does."""
    return [entry for entry in read_catalogue(folder) if entry.image_type == "dermoscopic"]


def metadata_rows(file: Path) -> list[Mapping[str, object]]:
    """Read the rows of one metadata file, Parquet or CSV, as they are."""
    if file.suffix == ".parquet":
        return list(pq.read_table(file).to_pylist())
    with file.open(newline="", encoding="utf-8-sig") as opened:
        return list(csv.DictReader(opened))


def metadata_file(folder: Path) -> Path:
    """The file that describes a folder's images. Raises NotFound."""
    for name in METADATA_FILES:
        if (folder / name).is_file():
            return folder / name
    raise NotFound(f"{folder} has none of {', '.join(METADATA_FILES)}.")


def write_catalogue(folder: Path, entries: Iterable[CatalogueEntry], name: str = METADATA) -> None:
    """Write a metadata file, ordered by isic_id; an earlier one is replaced only when this one is whole."""
    ordered = sorted(entries, key=lambda entry: entry.isic_id)
    table = pa.Table.from_pylist([asdict(entry) for entry in ordered], schema=SCHEMA)
    partial = folder / f"{name}.partial"
    pq.write_table(table, partial, compression="zstd")
    partial.replace(folder / name)


def _entry(row: Mapping[str, object], where: str) -> CatalogueEntry:
    cells = {name: str(value) for name, value in row.items() if value not in {None, ""}}
    for name in ("isic_id", "diagnosis", "copyright_license", "attribution"):
        if name not in cells:
            raise Conflict(f"{where}: no {name}; a reference must have one.")
    try:
        diagnosis = Diagnosis(cells["diagnosis"])
        age, size = (_whole_number(cells.get(name)) for name in ("age_approx", "bytes"))
    except ValueError as error:
        raise Conflict(f"{where}: {error}.") from error
    if diagnosis not in TRAINED:
        raise Conflict(f"{where}: {diagnosis} is the diagnosis of no reference.")
    licence = licence_of(cells["copyright_license"])
    if licence is None:
        raise Conflict(
            f"{where}: {cells['copyright_license'][:80]!r} is no licence of a reference; those are {', '.join(Licence)}."
        )
    if (public := cells.get("public", "true")).lower() not in _PUBLIC:
        raise Conflict(f"{where}: public is {public[:80]!r}; only a public image can be a reference.")
    usual = image_path(cells["isic_id"])
    path = cells.get("path", usual)
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise Conflict(f"{where}: the path {path!r} leads out of the folder.")
    sha256 = cells.get("sha256")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise Conflict(f"{where}: {sha256[:80]!r} is no SHA-256 in lower-case hexadecimal.")
    known: dict[str, Any] = {name: cell for name, cell in cells.items() if name in SCHEMA.names}
    known |= {"diagnosis": diagnosis, "copyright_license": licence, "path": path}
    return CatalogueEntry(**known | {"age_approx": age, "bytes": size})


def _whole_number(cell: str | None) -> int | None:
    # Tools that know no missing integers write 55.0.
    return None if cell is None else int(float(cell))
