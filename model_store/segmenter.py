"""The segmenter's folder: what it says of itself and how well it repeats, held to its digests; it is no model of `models/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
import math
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from model_store.manifest import EXACT, MANIFEST_NAME, FileDigest, InputSpec, read_exactly
from model_store.registry import digest_file, verify_files
from serve_app.domain.comparison import Metric
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
    """One segmenter, ready to be verified and loaded. `evaluation` is the file with its measured figures.

    `repeatability` is the file with what repeated captures of a lesion differ by; None until it has been measured.
    """

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
    repeatability: str | None = None


@dataclass(frozen=True, slots=True, config=EXACT)
class Limit:
    """What 95 of 100 pairs stay within, its 95 % interval (lesions resampled), and from how many pairs.

    Of a ratio it is the factor, either way; otherwise an absolute difference.
    """

    limit: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, slots=True, config=EXACT)
class Stratum:
    """Limits for pairs whose magnifications differ by `most_scale` at most, the softer at least `least_sharpness`."""

    name: str
    most_scale: float
    least_sharpness: float
    limits: Mapping[Metric, Limit]


@dataclass(frozen=True, slots=True, config=EXACT)
class Repeatability:
    """How much repeated captures of unchanged lesions differ, measured with one graph by one method.

    `source` says whose captures; `strata` are in order: the first that a pair fits counts, the last fits every pair.
    """

    source: str
    created: str
    graph: str
    method: int
    lesions: int
    pairs: int
    near_identical: int
    strata: tuple[Stratum, ...]

    def stratum(self, scale: float, sharpness: float) -> Stratum:
        """Where a pair belongs, by the ratio of its magnifications (1 or more) and its softer image's sharpness."""
        fitting = (s for s in self.strata if scale <= s.most_scale and sharpness >= s.least_sharpness)
        return next(fitting, self.strata[-1])


_MANIFEST, _REPEATABILITY = TypeAdapter(SegmenterManifest), TypeAdapter(Repeatability)


@plain_dataclass(frozen=True, slots=True)
class StoredSegmenter:
    """A verified folder; `digest` is its manifest's SHA-256, which holds that of every other file."""

    folder: Path
    manifest: SegmenterManifest
    digest: str
    repeatability: Repeatability | None

    @property
    def graph(self) -> str:
        """The graph's SHA-256."""
        return self.manifest.files[self.manifest.onnx].sha256


def open_segmenter(folder: Path) -> StoredSegmenter:
    """Read and verify a segmenter. Raises ModelContractError when it is missing, altered, or breaks its contract."""
    manifest = read_exactly(folder, _MANIFEST)
    limits = manifest.doubts
    shares = (limits.least_area, limits.frame_share, limits.main_share, limits.confidence)
    rules = (
        (manifest.model_id == f"{manifest.architecture}.{manifest.tag}", "model_id is not architecture.tag"),
        (manifest.modality == "dermoscopic", f"modality {manifest.modality!r} is not dermoscopic"),
        (
            {manifest.onnx, manifest.evaluation, manifest.repeatability or manifest.onnx}
            <= set(manifest.files),
            "no digest for the graph or its figures",
        ),
        # Not-a-number is in no range either.
        (all(0.0 <= share <= 1.0 for share in shares), "limits of doubt must lie between 0 and 1"),
    )
    if problems := [problem for kept, problem in rules if not kept]:
        raise ModelContractError(f"{folder / MANIFEST_NAME}: {'; '.join(problems)}.")
    verify_files(folder, manifest.files)
    graph = manifest.files[manifest.onnx].sha256
    known = read_repeatability(folder / manifest.repeatability, graph) if manifest.repeatability else None
    return StoredSegmenter(folder, manifest, digest_file(folder / MANIFEST_NAME), known)


def read_repeatability(path: Path, graph: str) -> Repeatability:
    """Limits from a segmenter's folder or of a site's own, measured with the graph of this SHA-256.

    Raises ModelContractError when they are another graph's, incomplete or no limits.
    """
    try:
        found = _REPEATABILITY.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelContractError(f"{path}: {error}") from error
    limits = [(m, limit) for s in found.strata for m, limit in s.limits.items()]
    rules = (
        (found.graph == graph, "it was measured with another graph"),
        (all(set(s.limits) == set(Metric) for s in found.strata), "a stratum lacks a metric"),
        (
            bool(found.strata) and found.strata[-1].least_sharpness == 0.0,
            "the last stratum does not fit every pair",
        ),
        # Not-a-number is in no order: a change would never be beyond it.
        (
            all((1.0 if m.is_ratio else 0.0) <= x.low <= x.limit <= x.high < math.inf for m, x in limits),
            "limits must be finite, and within their intervals",
        ),
    )
    if problems := [problem for kept, problem in rules if not kept]:
        raise ModelContractError(f"{path}: {'; '.join(problems)}.")
    return found
