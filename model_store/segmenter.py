"""The segmenter's folder: what it says of itself, held to its digests. It diagnoses nothing and is no model of `models/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from pathlib import Path

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from model_store.manifest import EXACT, MANIFEST_NAME, FileDigest, InputSpec, read_exactly
from model_store.registry import digest_file, verify_files
from serve_app.domain.errors import ModelContractError


@dataclass(frozen=True, slots=True, config=EXACT)
class OutlineSpec:
    """The output `logits`, float32 N×`size`: the log-odds that a place of the frame is lesion."""

    logits: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True, config=EXACT)
class DoubtLimits:
    """When an outline is not to be relied on; all are shares from 0 to 1.

    Below `least_area` of the frame there is no lesion. More than `frame_share` of the frame's edge in the lesion: it
    goes on beyond. Less than `main_share` of all that is called lesion in the largest piece: there are several.
    An expected IoU below `confidence`: too faint to be sure.
    """

    least_area: float
    frame_share: float
    main_share: float
    confidence: float
    fitted_on: str


@dataclass(frozen=True, slots=True, config=EXACT)
class SegmenterManifest:
    """One segmenter, ready to be verified and loaded. `evaluation` is the file with its measured figures."""

    model_id: str
    architecture: str
    tag: str
    modality: str
    created: str
    licence: str
    training_data: str
    onnx: str
    evaluation: str
    input: InputSpec
    output: OutlineSpec
    doubts: DoubtLimits
    files: Mapping[str, FileDigest]


_MANIFEST = TypeAdapter(SegmenterManifest)


@plain_dataclass(frozen=True, slots=True)
class StoredSegmenter:
    """A verified folder; `digest` is its manifest's SHA-256, which holds that of every other file."""

    folder: Path
    manifest: SegmenterManifest
    digest: str


def open_segmenter(folder: Path) -> StoredSegmenter:
    """Read and verify a segmenter. Raises ModelContractError when it is missing, altered, or breaks its contract."""
    manifest = read_exactly(folder, _MANIFEST)
    limits = manifest.doubts
    shares = (limits.least_area, limits.frame_share, limits.main_share, limits.confidence)
    rules = (
        (manifest.model_id == f"{manifest.architecture}.{manifest.tag}", "model_id is not architecture.tag"),
        (manifest.modality == "dermoscopic", f"modality {manifest.modality!r} is not dermoscopic"),
        (
            {manifest.onnx, manifest.evaluation} <= set(manifest.files),
            "no digest for the graph or its figures",
        ),
        # Not-a-number is in no range either.
        (all(0.0 <= share <= 1.0 for share in shares), "limits of doubt must lie between 0 and 1"),
    )
    if problems := [problem for kept, problem in rules if not kept]:
        raise ModelContractError(f"{folder / MANIFEST_NAME}: {'; '.join(problems)}.")
    verify_files(folder, manifest.files)
    return StoredSegmenter(folder, manifest, digest_file(folder / MANIFEST_NAME))
