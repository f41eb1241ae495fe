"""What a model folder says of itself, and the contract it must keep to be loaded.

`manifest.toml` is the whole truth about a model: nothing of it is repeated in code.
Field names follow timm's `pretrained_cfg` where it has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import json
import math
from pathlib import Path
import tomllib
from typing import TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import ModelContractError

MANIFEST_NAME = "manifest.toml"
EMBEDDING_DIM = 512
Kind = TypeVar("Kind")

#: Neither an unknown key nor a value of another type: a text is no number.
EXACT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True, config=EXACT)
class InputSpec:
    """What the ONNX input `name` takes: uint8 N×H×W×3; mean and std (0-1 scale) are inside the graph.

    `aspect_evidence` is the file of the folder that measures what `aspect` does to the answers.
    """

    name: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    aspect: str
    aspect_evidence: str | None = None


@dataclass(frozen=True, slots=True, config=EXACT)
class OutputSpec:
    """The outputs of the one forward pass, float32: logits N×8 and bottleneck N×512.

    An ensemble of M networks also gives `member_logits` N×M×8, whose mean are the logits. `unknown` is a raw
    out-of-distribution score N that the graph itself computes.
    """

    logits: str
    bottleneck: str
    embedding_dim: int
    label_space: tuple[str, ...]
    label_map: Mapping[str, Diagnosis]
    member_logits: str | None = None
    members: int = 1
    unknown: str | None = None


@dataclass(frozen=True, slots=True, config=EXACT)
class Calibration:
    """Temperature T of softmax(logits / T) (Guo et al., ICML 2017), and where it was fitted.

    `member_temperature` is that of each member alone; the mean of calibrated members is under-confident, so that
    its own is lower.
    """

    temperature: float
    fitted_on: str
    member_temperature: float | None = None


@dataclass(frozen=True, slots=True, config=EXACT)
class ConformalSpec:
    """Class-conditional split conformal sets (Vovk 2012): y is in the set when p(y) >= threshold[y]."""

    coverage: float
    thresholds: Mapping[Diagnosis, float]
    fitted_on: str


@dataclass(frozen=True, slots=True, config=EXACT)
class OutOfDistributionSpec:
    """A score of how far an image is from what was trained on, and its map to p(UNK).

    `statistics` is an .npz with `means` (C×512) and `precision` (512×512): the least squared
    Mahalanobis distance under a shared covariance (Lee et al., NeurIPS 2018), divided by 512. Without it the score
    is the graph's output `unknown`. p(UNK) = 1 / (1 + exp(-(slope * score + intercept))).
    """

    method: str
    slope: float
    intercept: float
    fitted_on: str
    statistics: str | None = None


@dataclass(frozen=True, slots=True, config=EXACT)
class EmbeddingSpaceSpec:
    """A linear map of the bottleneck: unit(matrix @ (bottleneck - mean)), from an .npz of both."""

    embedding_space: str
    transform: str
    references: str
    count: int


@dataclass(frozen=True, slots=True, config=EXACT)
class OperatingPoint:
    """A named threshold on a calibrated probability, with the evidence it was chosen on.

    `positives` lesions of which `misses` fell below the threshold on the fitting fold.
    """

    diagnoses: tuple[Diagnosis, ...]
    threshold: float
    sensitivity: float
    specificity: float
    positives: int
    misses: int
    fitted_on: str


@dataclass(frozen=True, slots=True, config=EXACT)
class FileDigest:
    """A file of the folder: its size in bytes and SHA-256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, config=EXACT)
class Manifest:
    """One model, ready to be verified and loaded."""

    model_id: str
    architecture: str
    tag: str
    modality: str
    created: str
    licence: str
    training_data: str
    onnx: str
    input: InputSpec
    output: OutputSpec
    calibration: Calibration
    conformal: ConformalSpec
    ood: OutOfDistributionSpec
    spaces: tuple[EmbeddingSpaceSpec, ...]
    operating_points: Mapping[str, OperatingPoint]
    files: Mapping[str, FileDigest]

    @property
    def live_space(self) -> EmbeddingSpaceSpec:
        """The space that the model ships its own references in."""
        return self.spaces[0]


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.toml`.

    Raises ModelContractError for a missing or unknown key, a label space that does not map
    onto the eight trained diagnoses, or another modality than dermoscopic.
    """
    manifest = read_exactly(folder, _MANIFEST)
    if problems := list(_contract_problems(manifest)):
        raise ModelContractError(f"{folder / MANIFEST_NAME}: {'; '.join(problems)}.")
    return manifest


def read_exactly(folder: Path, kind: TypeAdapter[Kind]) -> Kind:
    """`folder/manifest.toml` as one kind of manifest. Raises ModelContractError for a missing or unknown key."""
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError as error:
        raise ModelContractError(f"{path} does not exist.") from error
    except tomllib.TOMLDecodeError as error:
        raise ModelContractError(f"{path} is not TOML: {error}.") from error
    try:
        # As JSON, whose arrays may be tuples and whose texts may be diagnoses.
        return kind.validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        found = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ModelContractError(f"{path}: {'; '.join(found)}.") from error


_MANIFEST = TypeAdapter(Manifest)


def _contract_problems(manifest: Manifest) -> Iterator[str]:
    output, conformal, calibration = manifest.output, manifest.conformal, manifest.calibration
    named = {manifest.onnx, manifest.ood.statistics, manifest.input.aspect_evidence}
    named.update(name for space in manifest.spaces for name in (space.transform, space.references))
    unvouched = ", ".join(sorted(filter(None, named - set(manifest.files))))
    rules = (
        (manifest.model_id == f"{manifest.architecture}.{manifest.tag}", "model_id is not architecture.tag"),
        (manifest.modality == "dermoscopic", f"modality {manifest.modality!r} is not dermoscopic"),
        (
            sorted(output.label_map) == sorted(output.label_space),
            "label_map does not cover label_space, each label once",
        ),
        (
            sorted(output.label_map.values()) == sorted(TRAINED),
            f"labels must map one to one onto {', '.join(TRAINED)}",
        ),
        (output.embedding_dim == EMBEDDING_DIM, f"embedding_dim is not {EMBEDDING_DIM}"),
        (
            set(conformal.thresholds) == set(TRAINED),
            "conformal thresholds do not cover the trained diagnoses",
        ),
        (
            (manifest.ood.statistics is None) != (output.unknown is None),
            "the out-of-distribution score needs statistics or an output of the graph, and not both",
        ),
        (
            output.members >= 1 and (output.members > 1) == (output.member_logits is not None),
            "member_logits are the output of several members",
        ),
        (bool(manifest.spaces), "there is no embedding space"),
        (not unvouched, f"no digest for {unvouched}"),
        # Not-a-number compares false with everything: a rule whose threshold it is would never fire.
        (
            all(
                0 < temperature < math.inf
                for temperature in (calibration.temperature, calibration.member_temperature)
                if temperature is not None
            ),
            "temperature must be positive",
        ),
        (0 < conformal.coverage < 1, "coverage must lie between 0 and 1"),
        (
            all(0 <= threshold <= 1 for threshold in conformal.thresholds.values()),
            "conformal thresholds must be probabilities",
        ),
        (
            math.isfinite(manifest.ood.slope) and math.isfinite(manifest.ood.intercept),
            "slope and intercept of the out-of-distribution score must be finite",
        ),
        (
            all(0 <= point.threshold <= 1 for point in manifest.operating_points.values()),
            "thresholds of operating points must be probabilities",
        ),
    )
    return (problem for kept, problem in rules if not kept)
