"""A second model to publish: the shipped one in another embedding space, turned by a random rotation.

Neighbours and similarities are those of the original as long as query and references are of one space;
across the two spaces they are noise. So an answer that mixed them would be seen.
"""

from __future__ import annotations

from pathlib import Path
import shutil
import tomllib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_jobs.training.manifest_file import write_manifest
from model_store.manifest import MANIFEST_NAME


def make_twin(original: Path, models: Path) -> str:
    """Write the twin of the model folder `original` into `models`; returns its id."""
    content = tomllib.loads((original / MANIFEST_NAME).read_text())
    content.pop("files")
    content["tag"] += "twin"
    content["model_id"] += "twin"
    folder = models / content["model_id"]
    shutil.copytree(original, folder)
    (space,) = content["spaces"]
    transform = folder / space["transform"]
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(512, 512)))[0].astype(np.float32)
    with np.load(transform) as arrays:
        mean, matrix = arrays["mean"], arrays["matrix"]
    np.savez(transform, mean=mean, matrix=rotation @ matrix)
    _turn_references(folder / space["references"], rotation)
    space["embedding_space"] += ".turned"
    write_manifest(folder, content)
    return content["model_id"]


def _turn_references(path: Path, rotation: np.ndarray) -> None:
    table = pq.read_table(path)
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    turned = flat.astype(np.float32).reshape(-1, 512) @ rotation.T
    halves = pa.array(turned.astype(np.float16).ravel(), pa.float16())
    column = pa.FixedSizeListArray.from_arrays(halves, 512)
    position = table.schema.get_field_index("embedding")
    field = table.schema.field(position)
    pq.write_table(table.set_column(position, field, column.cast(field.type)), path)
