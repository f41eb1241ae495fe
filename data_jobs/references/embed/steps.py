"""The two steps between the catalogue and the database, from Arrow table to Arrow table. Without Ray.

An image that cannot be used travels on as a row with a cause and no pixels, so that one bad file never
costs its neighbours anything.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pyarrow as pa

from data_jobs.references.catalogue import CatalogueEntry
from data_jobs.references.embedder import ReferenceEmbedder, prepare_reference, space_spec
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore
from model_store.session import Device
from serve_app.domain.errors import StageFailed
from serve_app.records.reference_cache import FailedReference
from serve_app.records.references import ReferenceImage

#: So many images have their pixels in memory at a time, where one process does both steps.
_PREPARED_AT_ONCE = 32

#: What a row carries of its image from the catalogue to the database.
IMAGE_COLUMNS = tuple(field.name for field in fields(ReferenceImage))

_CATALOGUE = pa.schema(
    [pa.field(name, pa.int16() if name == "age_approx" else pa.string()) for name in IMAGE_COLUMNS]
    + [pa.field("path", pa.string()), pa.field("sha256", pa.string())]
)
_PREPARED = {
    "pixels": pa.binary(),
    "jpeg": pa.binary(),
    "jpeg_sha256": pa.string(),
    "width": pa.int16(),
    "height": pa.int16(),
    "cause": pa.string(),
    "detail": pa.string(),
}


def catalogue_table(entries: list[CatalogueEntry]) -> pa.Table:
    """What the first step reads: the columns of an image, and where its file is."""
    rows = [{name: getattr(entry, name) for name in _CATALOGUE.names} for entry in entries]
    return pa.Table.from_pylist(rows, schema=_CATALOGUE)


@dataclass(frozen=True, slots=True)
class PrepareImages:
    """Read, decode and resize the files of a catalogue's rows, and make a picture of each if wanted."""

    folder: Path
    geometry: InputGeometry
    pictures: bool

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`path` and `sha256` in; in their place pixels (side·side·3 bytes) or a cause out."""
        rows = [
            self._prepare(*names)
            for names in zip(
                *(batch[name].to_pylist() for name in ("isic_id", "path", "sha256")), strict=True
            )
        ]
        table = batch.drop_columns(["path", "sha256"])
        for name, kind in _PREPARED.items():
            table = table.append_column(name, pa.array([row.get(name) for row in rows], kind))
        return table

    def _prepare(self, isic_id: str, path: str, sha256: str | None) -> dict[str, Any]:
        found = prepare_reference(
            self.folder / path, isic_id, self.geometry, sha256=sha256, picture=self.pictures
        )
        if isinstance(found, FailedReference):
            return {"cause": found.cause, "detail": found.detail}
        row: dict[str, Any] = {"pixels": found.pixels.tobytes()}
        if (picture := found.picture) is not None:
            row |= {"jpeg": picture.jpeg, "jpeg_sha256": picture.sha256}
            row |= {"width": picture.width, "height": picture.height}
        return row


class EmbedImages:
    """Pixels to unit vectors; loads and verifies the model once, where it runs."""

    def __init__(
        self, models: Path, model_id: str, embedding_space: str, *, threads: int, device: Device, batch: int
    ) -> None:
        model = ModelStore(models).open(model_id)
        self._shape = (-1, *model.manifest.input.input_size[1:], model.manifest.input.input_size[0])
        self._embedder = ReferenceEmbedder(
            model, space_spec(model, embedding_space), threads=threads, device=device, batch=batch
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`pixels` in; in their place `embedding` out: 512 float32 as bytes, null where there is a cause."""
        pixels, causes, details = (batch[name].to_pylist() for name in ("pixels", "cause", "detail"))
        embeddings: list[bytes | None] = [None] * len(pixels)
        good = [position for position, cause in enumerate(causes) if cause is None]
        images = np.frombuffer(b"".join(pixels[i] for i in good), np.uint8).reshape(self._shape)
        for position, vector in zip(good, self._embed(images), strict=True):
            if isinstance(vector, StageFailed):
                causes[position], details[position] = vector.code, str(vector)
            else:
                embeddings[position] = vector.tobytes()
        table = batch.drop_columns(["pixels", "cause", "detail"])
        for name, values, kind in (
            ("embedding", embeddings, pa.binary()),
            ("cause", causes, pa.string()),
            ("detail", details, pa.string()),
        ):
            table = table.append_column(name, pa.array(values, kind))
        return table

    def _embed(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32] | StageFailed]:
        try:
            return list(self._embedder.embed(images))
        except StageFailed:
            # One of them has no finite vector: find out which.
            return [self._embed_one(image) for image in images]

    def _embed_one(self, image: NDArray[np.uint8]) -> NDArray[np.float32] | StageFailed:
        try:
            return np.asarray(self._embedder.embed(image[np.newaxis])[0])
        except StageFailed as failure:
            return failure


def embed_files(batch: pa.Table, prepare: PrepareImages, embed: EmbedImages) -> pa.Table:
    """Both steps, a few images at a time: the pixels of a whole batch are never in memory together."""
    starts = range(0, batch.num_rows, _PREPARED_AT_ONCE)
    return pa.concat_tables([embed(prepare(batch.slice(start, _PREPARED_AT_ONCE))) for start in starts])
