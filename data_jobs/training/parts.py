"""Packed images: what a machine needs that has neither the archive nor this service, in files that are easily sent.

A part is one .npz: `jpeg`, the files of its images one after another, and where each ends (`ends`); of every image
`labels`, `folds` and `sources` (in the orders of TRAINED and SOURCES); `first`, its place in the whole; and `header`, JSON
that says what the whole is. Only what may be trained on is in it (`dataset.training_indices`). JPEG of quality 90 is a
sixteenth of the pixels, at a mean error of one level.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
import torch
from torch import Tensor

from data_jobs.training.recipe import SOURCES, DataPlan, Recipe

Bytes = NDArray[np.uint8]
Rows = NDArray[np.int64]
QUALITY = 90
#: What is known of every image.
COLUMNS = ("labels", "folds", "sources")


@dataclass(frozen=True, slots=True)
class PackHeader:
    """What a whole pack is: the side of its full-size images, how they were prepared, which rows, under which plan."""

    side: int
    preprocess: str
    quality: int
    images: int
    rows_sha256: str
    plan: dict[str, Any]

    @classmethod
    def plan_of(cls, plan: DataPlan) -> dict[str, Any]:
        """What of a data plan shapes the parts, as JSON gives it back."""
        kept = asdict(plan) | {"train_folds": list(plan.train_folds)}
        return {name: value for name, value in kept.items() if name not in {"cache_side", "left_out"}}


@dataclass(frozen=True, slots=True)
class Part:
    """One file: images `first` to `first` + N of the whole, compressed."""

    header: PackHeader
    first: int
    jpegs: list[bytes]
    columns: dict[str, Rows]

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(
                file,
                jpeg=np.frombuffer(b"".join(self.jpegs), np.uint8),
                ends=np.cumsum([len(data) for data in self.jpegs]),
                first=np.array(self.first),
                header=np.array(json.dumps(asdict(self.header))),
                **self.columns,  # type: ignore[arg-type]
            )
        partial.rename(path)


def read_parts(folder: Path) -> list[Part]:
    """The parts in a folder, in order. Raises ValueError where they are of different packs, or one between is missing."""
    parts: list[Part] = []
    for path in sorted(folder.glob("part-*.npz")):
        with np.load(path, allow_pickle=False) as file:
            header = PackHeader(**json.loads(str(file["header"])))
            content, ends = file["jpeg"].tobytes(), file["ends"].tolist()
            columns = {name: file[name] for name in COLUMNS}
            jpegs = [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            part = Part(header, int(file["first"]), jpegs, columns)
        if parts and header != parts[0].header:
            raise ValueError(f"{path} is of another pack than the parts before it: empty {folder}.")
        if part.first != sum(len(other.jpegs) for other in parts):
            raise ValueError(
                f"{path} does not go on where the parts before it end: one is missing in {folder}."
            )
        parts.append(part)
    return parts


@dataclass(frozen=True, slots=True)
class PackedImages:
    """All images of a pack: pixels of each source, uint8 N×H×H×3 in the order of its rows, and columns of all rows."""

    header: PackHeader
    pixels: list[Tensor]
    columns: dict[str, Rows]

    @classmethod
    def read(cls, folder: Path) -> PackedImages:
        """Decode every part. Raises ValueError when there are none, or not all."""
        parts = read_parts(folder)
        found = sum(len(part.jpegs) for part in parts)
        if not parts or found != parts[0].header.images:
            raise ValueError(
                f"{folder} has {found} images of {parts[0].header.images if parts else 'a pack'}."
            )
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS}
        jpegs = [data for part in parts for data in part.jpegs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = list(pool.map(decoded, jpegs))
        of_source = [
            [images[i] for i in np.flatnonzero(columns["sources"] == s)] for s in range(len(SOURCES))
        ]
        pixels = [torch.from_numpy(np.stack(found)) for found in of_source if found]
        return cls(parts[0].header, pixels, columns)

    def training_indices(self, left_out: int) -> Rows:
        """Rows that the member which leaves out this fold trains on."""
        return np.flatnonzero(self.columns["folds"] != left_out)


def start_of(recipe: Recipe) -> str:
    """What a recipe's network starts from, as `start.safetensors` says it."""
    named = recipe.start or recipe.weights
    return f"{recipe.architecture} from {named or 'ImageNet'}"


def encoded(pixels: Bytes) -> bytes:
    """The JPEG of an image uint8 H×H×3."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def decoded(jpeg: bytes) -> Bytes:
    """Its pixels, uint8 H×H×3."""
    return np.array(Image.open(io.BytesIO(jpeg)))
