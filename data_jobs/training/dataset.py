"""The labelled images: rows of train.csv, their folds, and their pixels as the service sees them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
import csv
from dataclasses import dataclass, fields
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.training.recipe import BCN84_SIDE, SOURCES, DataPlan
from deployments.preprocess.pixels import PREPROCESS_VERSION, InputGeometry
from deployments.preprocess.preprocess import prepare_image
from serve_app.domain.diagnosis import TRAINED, Diagnosis

ARCHIVE, BCN84 = SOURCES
#: Smartphone photographs of skin, which are no dermoscopy.
CLINICAL = "clinical"
#: Lesions that two folds have under two names; docs/models.md says how they were found.
EXCLUDED = Path(__file__).with_name("duplicates.json")


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One row of train.csv or bcn84.csv; empty cells are None. `aspect` is "true" or "squashed"."""

    isic_id: str
    diagnosis: Diagnosis
    fold: int
    lesion_id: str | None
    patient_id: str | None
    age_approx: int | None
    sex: str | None
    anatom_site_general: str | None
    diagnosis_confirm_type: str | None
    copyright_license: str
    attribution: str
    width: int
    height: int
    aspect: str
    source: str = ARCHIVE

    @property
    def lesion(self) -> str:
        """The lesion, or the image itself where the archive names none."""
        return self.lesion_id or self.isic_id

    @property
    def label(self) -> int:
        """Index in TRAINED."""
        return TRAINED.index(self.diagnosis)

    @property
    def path(self) -> str:
        """The file, relative to the archive's folder."""
        return f"{'' if self.source == ARCHIVE else f'{self.source}/'}images/{self.isic_id}.jpg"


def isic_folder() -> Path:
    """The archive's folder: `DERM_ISIC_DIR`, or ../shared/isic."""
    return Path(os.environ.get("DERM_ISIC_DIR", "../shared/isic"))


def read_rows(folder: Path) -> list[LabelledImage]:
    """All rows of train.csv, in file order."""
    with (folder / "train.csv").open(newline="", encoding="utf-8") as file:
        return [_row(raw) for raw in csv.DictReader(file)]


def read_bcn84(folder: Path) -> list[LabelledImage]:
    """All rows of bcn84/bcn84.csv under the archive's folder, in file order."""
    with (folder / BCN84 / "bcn84.csv").open(newline="", encoding="utf-8") as file:
        return [_row(_BCN84_CELLS | raw) for raw in csv.DictReader(file)]


def read_clinical(folder: Path) -> list[LabelledImage]:
    """All rows of clinical/clinical.csv, in file order; none where there is no such file.

    Of their patients p(UNK) may be fitted on one half (fold 1), by a hash of the name; the other is fold 0.
    """
    path = folder / CLINICAL / "clinical.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        cells = [_BCN84_CELLS | raw | {"source": CLINICAL} for raw in csv.DictReader(file)]
    halves = [hashlib.sha256(raw["patient_id"].encode()).digest()[0] % 2 for raw in cells]
    return [
        _row(raw | {"isic_id": raw["image_id"], "fold": str(1 - half)})
        for raw, half in zip(cells, halves, strict=True)
    ]


#: What every row of bcn84.csv has in common: its originals were square, and who confirmed them is not known.
_BCN84_CELLS = {
    "patient_id": "",
    "diagnosis_confirm_type": "",
    "width": str(BCN84_SIDE),
    "height": str(BCN84_SIDE),
    "aspect": "true",
    "source": BCN84,
}


def _row(raw: dict[str, str]) -> LabelledImage:
    cells = {field.name: raw.get(field.name) or None for field in fields(LabelledImage)}
    numbers = {name: int(raw.get(name) or 0) for name in ("fold", "width", "height")}
    age = int(float(raw["age_approx"])) if raw.get("age_approx") else None
    source = raw.get("source", ARCHIVE)
    made = numbers | {"diagnosis": Diagnosis(raw["diagnosis"]), "age_approx": age, "source": source}
    return LabelledImage(**(cells | made))  # type: ignore[arg-type]


def fold_indices(rows: list[LabelledImage], folds: Iterable[int]) -> NDArray[np.int64]:
    """Positions of the rows of these folds."""
    wanted = set(folds)
    return np.array([i for i, row in enumerate(rows) if row.fold in wanted], dtype=np.int64)


def labels_of(rows: list[LabelledImage]) -> NDArray[np.int64]:
    """Index in TRAINED of every row."""
    return np.array([row.label for row in rows], dtype=np.int64)


def of_ham10000(rows: list[LabelledImage]) -> NDArray[np.bool_]:
    """Which rows come from HAM10000."""
    return np.array([(row.lesion_id or "").startswith("HAM_") for row in rows], dtype=np.bool_)


def sources_of(rows: list[LabelledImage]) -> NDArray[np.int64]:
    """Index in SOURCES of every row."""
    return np.array([SOURCES.index(row.source) for row in rows], dtype=np.int64)


def reserve(rows: list[LabelledImage], plan: DataPlan) -> frozenset[str]:
    """Lesions of the training folds that no member of an ensemble trains on: its mean is fitted and checked on them.

    `reserve_share` of every diagnosis and source, those whose names have the lowest hash under `reserve_seed`.
    """
    groups: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        if row.fold in plan.train_folds:
            groups[row.source, row.diagnosis].add(row.lesion)
    kept: set[str] = set()
    for lesions in groups.values():
        ordered = sorted(lesions, key=lambda x: hashlib.sha256(f"{plan.reserve_seed} {x}".encode()).digest())
        kept.update(ordered[: round((plan.reserve_share or 0.0) * len(ordered))])
    return frozenset(kept)


def excluded_lesions() -> frozenset[str]:
    """Lesions that another fold has under another name: no member trains on them, and none is a reference."""
    return frozenset(json.loads(EXCLUDED.read_text(encoding="utf-8")))


def training_indices(rows: list[LabelledImage], plan: DataPlan) -> NDArray[np.int64]:
    """Rows to train on. Raises ValueError when a lesion of them is in the test or calibration fold."""
    apart = reserve(rows, plan)
    if plan.reserve_share is not None:
        apart |= excluded_lesions()
    found = fold_indices(rows, [fold for fold in plan.train_folds if fold != plan.left_out])
    indices = np.array([i for i in found if rows[i].lesion not in apart], dtype=np.int64)
    held_out = {row.lesion for row in rows if row.fold in {plan.test_fold, plan.calibration_fold}}
    if leaked := held_out & {rows[i].lesion for i in indices}:
        raise ValueError(f"Lesions on both sides of the split: {', '.join(sorted(leaked)[:5])}.")
    return indices


def build_cache(
    rows: list[LabelledImage], folder: Path, cache: Path, geometry: InputGeometry
) -> NDArray[np.uint8]:
    """Pixels of every row, uint8 N×side×side×3, memory-mapped read-only; made once by the service's own code.

    The file name holds side and preprocess version, so a change of either makes a new cache.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"pixels-{geometry.side}-{geometry.interpolation}-v{PREPROCESS_VERSION}-{len(rows)}.npy"
    if not path.exists():
        partial = path.with_suffix(".partial")
        shape = (len(rows), geometry.side, geometry.side, 3)
        pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for i, row in enumerate(rows):
            pixels[i] = read_pixels(row, folder, geometry)
        pixels.flush()
        del pixels
        partial.rename(path)
    mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return mapped


def load_pixels(
    rows: list[LabelledImage], indices: Iterable[int], folder: Path, geometry: InputGeometry
) -> NDArray[np.uint8]:
    """Pixels of the rows at `indices`, uint8 N×side×side×3, in memory; decoded on several cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(lambda i: read_pixels(rows[i], folder, geometry), indices)))


def read_pixels(row: LabelledImage, folder: Path, geometry: InputGeometry) -> NDArray[np.uint8]:
    """One image as the service would prepare it, uint8 side×side×3."""
    data = (folder / row.path).read_bytes()
    return prepare_image(data, geometry, ARCHIVE_LIMITS).pixels
