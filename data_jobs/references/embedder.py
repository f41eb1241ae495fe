"""What turns a reference image into a vector of a space: the code that answers online, image by image."""

from __future__ import annotations

from dataclasses import dataclass
import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.training.dataset import LabelledImage, load_pixels
from deployments.embedder.embedder import EmbeddingSpace
from deployments.preprocess.decode import DecodedImage, decode_image
from deployments.preprocess.pixels import PREPROCESS_VERSION, InputGeometry, resize_to_input
from model_store.manifest import EMBEDDING_DIM, EmbeddingSpaceSpec
from model_store.registry import StoredModel
from model_store.session import Device, InferenceSession
from serve_app.domain.errors import ModelContractError, RejectedUpload
from serve_app.records.references import FailedReference, ReferencePicture, SpaceEmbedder

#: Longer side of a picture, pixels: as large as a neighbour is shown beside the patient's image.
PICTURE_SIDE = 384
_PICTURE_QUALITY = 85
#: Pixels in memory together.
_AT_A_TIME = 64


def space_spec(model: StoredModel, embedding_space: str | None) -> EmbeddingSpaceSpec:
    """A space of a model, its first unless one is named. Raises ModelContractError."""
    spaces = {spec.embedding_space: spec for spec in model.manifest.spaces}
    found = spaces.get(embedding_space or model.manifest.live_space.embedding_space)
    if found is None:
        raise ModelContractError(
            f"{model.manifest.model_id} has no space {embedding_space!r}, but {', '.join(spaces)}."
        )
    return found


def identify_embedder(model: StoredModel, spec: EmbeddingSpaceSpec) -> SpaceEmbedder:
    """Name what decides a vector: network, transform and preprocessing, by one digest.

    Calibration, operating points and the model card do not: a model folder that differs in
    nothing else gives the same vectors.
    """
    manifest = model.manifest
    parts = (
        manifest.files[manifest.onnx].sha256,
        manifest.files[spec.transform].sha256,
        repr(manifest.input),
        manifest.output.bottleneck,
        PREPROCESS_VERSION,
    )
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return SpaceEmbedder(spec.embedding_space, manifest.model_id, digest, PREPROCESS_VERSION)


@dataclass(frozen=True, slots=True)
class PreparedReference:
    """Pixels as the model takes them (uint8 side×side×3), and a picture to show where one was asked for."""

    pixels: NDArray[np.uint8]
    picture: ReferencePicture | None


def prepare_reference(
    path: Path, isic_id: str, geometry: InputGeometry, *, sha256: str | None = None, picture: bool = True
) -> PreparedReference | FailedReference:
    """Read and prepare one image; what is wrong with it is an answer, never an exception.

    `sha256`: what the catalogue states for the file (hex), if it does.
    """
    try:
        data = path.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            return FailedReference(isic_id, "altered", "The file is not the one that was fetched.")
        decoded = decode_image(data, ARCHIVE_LIMITS, target_side=geometry.side)
        pixels = resize_to_input(decoded.image, geometry, decoded.extent)
        shown = make_picture(isic_id, decoded) if picture else None
    except RejectedUpload as rejection:
        return FailedReference(isic_id, rejection.code, str(rejection))
    except OSError as error:
        return FailedReference(isic_id, "unreadable", error.strerror or type(error).__name__)
    return PreparedReference(pixels, shown)


def make_picture(isic_id: str, decoded: DecodedImage) -> ReferencePicture:
    """Make the picture to show: at most PICTURE_SIDE on its longer side, upright, without metadata."""
    left, top, right, bottom = decoded.extent
    scale = min(1.0, PICTURE_SIDE / max(right - left, bottom - top))
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    small = decoded.image.resize(size, Image.Resampling.BICUBIC, box=decoded.extent)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_PICTURE_QUALITY)
    jpeg = buffer.getvalue()
    return ReferencePicture(isic_id, *size, hashlib.sha256(jpeg).hexdigest(), jpeg)


class ReferenceEmbedder:
    """A session and a space, held by whoever embeds many images.

    One image a pass: what a vector is must not depend on what else was in its batch, and on a CPU
    a batch saves nothing. On a GPU a batch has a fixed size, filled up with repeats.
    """

    def __init__(
        self,
        model: StoredModel,
        spec: EmbeddingSpaceSpec,
        *,
        threads: int = 1,
        device: Device = "cpu",
        batch: int = 1,
    ) -> None:
        self._session = InferenceSession(model, threads=threads, device=device)
        self._space = EmbeddingSpace.from_model(model, spec)
        self._batch = batch

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed N images (uint8 N×side×side×3) as unit vectors, float32 N×512. StageFailed as the space's."""
        vectors = []
        for start in range(0, len(pixels), self._batch):
            part = pixels[start : start + self._batch]
            filled = np.concatenate([part, np.repeat(part[-1:], self._batch - len(part), axis=0)])
            bottleneck = self._session.run(filled).bottleneck[: len(part)]
            vectors += [self._space.embed(row[np.newaxis]) for row in bottleneck]
        return np.concatenate(vectors) if vectors else np.empty((0, EMBEDDING_DIM), np.float32)


def embed_rows(
    rows: list[LabelledImage], archive: Path, model: StoredModel, spec: EmbeddingSpaceSpec, *, threads: int
) -> NDArray[np.float32]:
    """N×512 unit vectors of the rows, as the embed job and the service make them."""
    embedder = ReferenceEmbedder(model, spec, threads=threads)
    geometry = InputGeometry.from_manifest(model.manifest.input)
    parts = []
    for start in range(0, len(rows), _AT_A_TIME):
        indices = range(start, min(start + _AT_A_TIME, len(rows)))
        parts.append(embedder.embed(load_pixels(rows, indices, archive, geometry)))
    return np.concatenate(parts)
