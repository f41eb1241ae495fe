"""Copies of a model folder with something changed about them; what is not changed is a hard link."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import shutil
import tomllib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from data_jobs.training.manifest_file import seal
from model_store.manifest import MANIFEST_NAME, read_manifest
from serve_app.settings import REPOSITORY

RECIPES = REPOSITORY / "data_jobs" / "training" / "recipes"
Change = Callable[[dict[str, Any]], object]


def copy_model(source: Path, store: Path, tag: str | None = None, change: Change | None = None) -> str:
    """Copy a model into a store, under another tag or its own, its manifest changed; returns its id."""
    content = tomllib.loads((source / MANIFEST_NAME).read_text())
    if tag is not None:
        content |= {"model_id": f"{content['architecture']}.{tag}", "tag": tag}
    if change is not None:
        change(content)
    folder = store / (source.name if tag is None else content["model_id"])
    shutil.copytree(source, folder, copy_function=_link)
    rewrite(folder / MANIFEST_NAME, tomli_w.dumps(content).encode())
    return folder.name


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link: the original stays as it is
    path.write_bytes(content)


def thin_references(folder: Path, count: int) -> None:
    """Keep that many of a model's references: thousands take the database seconds for every test."""
    path = _references(folder)
    table = pq.read_table(path)
    path.unlink()
    pq.write_table(table.take(list(range(0, table.num_rows, table.num_rows // count))[:count]), path)
    seal(folder, references=count)


def turn_references(folder: Path, turn: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put others in the place of a model's reference vectors, (n, 512) float32; to be sealed afterwards."""
    path = _references(folder)
    table = pq.read_table(path)
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    turned = turn(flat.astype(np.float32).reshape(-1, 512))
    halves = pa.array(turned.astype(np.float16).ravel(), pa.float16())
    position = table.schema.get_field_index("embedding")
    field = table.schema.field(position)
    column = pa.FixedSizeListArray.from_arrays(halves, 512).cast(field.type)
    path.unlink()
    pq.write_table(table.set_column(position, field, column), path)


def _references(folder: Path) -> Path:
    return folder / read_manifest(folder).live_space.references


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
