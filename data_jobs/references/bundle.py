"""The references that ship with a model: `python -m data_jobs.references.bundle --model M`.

Chooses about 4,000 confirmed images of the folds that are not the test fold, one a lesion,
embeds them with the model's own session and live space, writes `references.parquet` into the
model folder and seals it anew.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import pyarrow as pa
import pyarrow.parquet as pq

from data_jobs.references.embedder import embed_rows
from data_jobs.training.dataset import LabelledImage, excluded_lesions, isic_folder, read_rows
from data_jobs.training.manifest_file import seal
from model_store.manifest import EMBEDDING_DIM
from model_store.registry import ModelStore
from serve_app.domain.diagnosis import TRAINED, Diagnosis

TARGET = 4000
FOLDS = frozenset({1, 2, 3, 4})
SEED = 4000

_OPTIONAL = {"lesion_id", "patient_id", "age_approx", "sex", "anatom_site_general"}
_NAMES = ["isic_id", "lesion_id", "patient_id", "diagnosis", "diagnosis_confirm_type", "age_approx", "sex"]
_NAMES += ["anatom_site_general", "image_type", "copyright_license", "attribution"]
#: All but the embedding, which comes last.
_DESCRIBED = pa.schema(
    [
        pa.field(name, pa.int16() if name == "age_approx" else pa.string(), nullable=name in _OPTIONAL)
        for name in _NAMES
    ]
)
_EMBEDDING = pa.field("embedding", pa.list_(pa.float16(), EMBEDDING_DIM), nullable=False)


def choose_references(rows: list[LabelledImage], target: int = TARGET) -> list[LabelledImage]:
    """Confirmed images, one a lesion: all there are of every diagnosis but naevi, which fill up to `target`.

    Naevi are spread over the body sites. Equal for equal rows.
    """
    rng, excluded = np.random.default_rng(SEED), excluded_lesions()
    lesions: dict[str, LabelledImage] = {}
    for position in rng.permutation(len(rows)):
        row = rows[position]
        if row.fold in FOLDS and row.diagnosis_confirm_type is not None and row.lesion not in excluded:
            lesions.setdefault(row.lesion, row)
    chosen = [
        row for row in lesions.values() if row.diagnosis in TRAINED and row.diagnosis is not Diagnosis.NV
    ]
    naevi = [row for row in lesions.values() if row.diagnosis is Diagnosis.NV]
    chosen += spread_over_sites(naevi, max(0, target - len(chosen)))
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
    described = [{**asdict(row), "image_type": "dermoscopic"} for row in rows]
    table = pa.Table.from_pylist(described, schema=_DESCRIBED).append_column(
        _EMBEDDING, pa.FixedSizeListArray.from_arrays(halves, EMBEDDING_DIM)
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
