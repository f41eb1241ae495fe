"""The references that ship with a model: `python -m data_jobs.references.bundle --model M`.

Chooses about 4,000 confirmed images of the folds that are not the test fold, one a lesion,
embeds them with the model's own session and live space, writes `references.parquet` into the
model folder and seals it anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import pyarrow as pa
import pyarrow.parquet as pq

from data_jobs.references.embedder import embed_rows
from data_jobs.training.dataset import LabelledImage, isic_folder, read_rows
from data_jobs.training.manifest_file import seal
from model_store.manifest import EMBEDDING_DIM
from model_store.registry import ModelStore
from serve_app.domain.diagnosis import TRAINED, Diagnosis

TARGET = 4000
FOLDS = frozenset({1, 2, 3, 4})
SEED = 4000

SCHEMA = pa.schema(
    [
        pa.field("isic_id", pa.string(), nullable=False),
        pa.field("lesion_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("diagnosis", pa.string(), nullable=False),
        pa.field("diagnosis_confirm_type", pa.string(), nullable=False),
        pa.field("age_approx", pa.int16()),
        pa.field("sex", pa.string()),
        pa.field("anatom_site_general", pa.string()),
        pa.field("image_type", pa.string(), nullable=False),
        pa.field("copyright_license", pa.string(), nullable=False),
        pa.field("attribution", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float16(), EMBEDDING_DIM), nullable=False),
    ]
)


def choose_references(rows: list[LabelledImage], target: int = TARGET) -> list[LabelledImage]:
    """Confirmed images, one a lesion: all there are of every diagnosis but naevi, which fill up to `target`.

    Naevi are spread over the body sites. Equal for equal rows.
    """
    rng = np.random.default_rng(SEED)
    lesions: dict[str, LabelledImage] = {}
    for position in rng.permutation(len(rows)):
        row = rows[position]
        if row.fold in FOLDS and row.diagnosis_confirm_type is not None:
            lesions.setdefault(row.lesion, row)
    by_diagnosis = {d: [row for row in lesions.values() if row.diagnosis is d] for d in TRAINED}
    chosen: list[LabelledImage] = []
    for diagnosis, found in by_diagnosis.items():
        if diagnosis is not Diagnosis.NV:
            chosen += found
    chosen += spread_over_sites(by_diagnosis[Diagnosis.NV], max(0, target - len(chosen)))
    return sorted(chosen, key=lambda row: row.isic_id)


def spread_over_sites(rows: list[LabelledImage], count: int) -> list[LabelledImage]:
    """The first `count` when taking one row of every body site in turn."""
    sites: dict[str, list[LabelledImage]] = {}
    for row in rows:
        sites.setdefault(row.anatom_site_general or "", []).append(row)
    turns = [(turn, site, row) for site, group in sites.items() for turn, row in enumerate(group)]
    return [row for _, _, row in sorted(turns, key=lambda entry: entry[:2])][:count]


def write_references(path: Path, rows: list[LabelledImage], embeddings: NDArray[np.float32]) -> None:
    """Write rows and their N×512 embeddings as Parquet (zstd), embeddings as half floats."""
    halves = pa.array(embeddings.astype(np.float16).ravel(), pa.float16())
    table = pa.Table.from_arrays(
        [
            pa.array([row.isic_id for row in rows], pa.string()),
            pa.array([row.lesion_id for row in rows], pa.string()),
            pa.array([row.patient_id for row in rows], pa.string()),
            pa.array([row.diagnosis.value for row in rows], pa.string()),
            pa.array([row.diagnosis_confirm_type for row in rows], pa.string()),
            pa.array([row.age_approx for row in rows], pa.int16()),
            pa.array([row.sex for row in rows], pa.string()),
            pa.array([row.anatom_site_general for row in rows], pa.string()),
            pa.array(["dermoscopic"] * len(rows), pa.string()),
            pa.array([row.copyright_license for row in rows], pa.string()),
            pa.array([row.attribution for row in rows], pa.string()),
            pa.FixedSizeListArray.from_arrays(halves, EMBEDDING_DIM),
        ],
        schema=SCHEMA,
    )
    pq.write_table(table, path, compression="zstd", compression_level=12)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = ModelStore(arguments.models).open(arguments.model)
    live = model.manifest.live_space
    rows = choose_references(read_rows(isic_folder()))
    embeddings = embed_rows(rows, isic_folder(), model, live, threads=arguments.threads)
    write_references(model.folder / live.references, rows, embeddings)
    seal(model.folder, references=len(rows))
    print(f"{len(rows)} references in {live.embedding_space}")


if __name__ == "__main__":
    main()
