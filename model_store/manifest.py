"""What a model folder says of itself, and the contract it must keep to be loaded.

`manifest.toml` is the whole truth about a model: nothing of it is repeated in code.
Field names follow timm's `pretrained_cfg` where it has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
import math
from pathlib import Path
import tomllib
from typing import Any

from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import ModelContractError

MANIFEST_NAME = "manifest.toml"
EMBEDDING_DIM = 512


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The two outputs of the one forward pass: logits N×8 and bottleneck N×512, float32."""

    logits: str
    bottleneck: str
    embedding_dim: int
    label_space: tuple[str, ...]
    label_map: Mapping[str, Diagnosis]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperature T of softmax(logits / T) (Guo et al., ICML 2017), and where it was fitted."""

    temperature: float
    fitted_on: str


@dataclass(frozen=True, slots=True)
class ConformalSpec:
    """Class-conditional split conformal sets (Vovk 2012): y is in the set when p(y) >= threshold[y]."""

    coverage: float
    thresholds: Mapping[Diagnosis, float]
    fitted_on: str


@dataclass(frozen=True, slots=True)
class OutOfDistributionSpec:
    """Distance of the bottleneck to the training classes, and its map to p(UNK).

    `statistics` is an .npz with `means` (C×512) and `precision` (512×512): the least squared
    Mahalanobis distance under a shared covariance (Lee et al., NeurIPS 2018), divided by 512.
    p(UNK) = 1 / (1 + exp(-(slope * score + intercept))).
    """

    method: str
    statistics: str
    slope: float
    intercept: float
    fitted_on: str


@dataclass(frozen=True, slots=True)
class EmbeddingSpaceSpec:
    """A linear map of the bottleneck: unit(matrix @ (bottleneck - mean)), from an .npz of both."""

    embedding_space: str
    transform: str
    references: str
    count: int


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file of the folder: its size in bytes and SHA-256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
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
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError as error:
        raise ModelContractError(f"{path} does not exist.") from error
    except tomllib.TOMLDecodeError as error:
        raise ModelContractError(f"{path} is not TOML: {error}.") from error
    try:
        manifest = _from_toml(raw)
        problems = list(_contract_problems(manifest))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelContractError(f"{path}: {type(error).__name__}: {error}.") from error
    if problems:
        raise ModelContractError(f"{path}: {'; '.join(problems)}.")
    return manifest


def _from_toml(raw: dict[str, Any]) -> Manifest:
    _refuse_unknown(raw, Manifest)
    _refuse_unknown(raw["output"], OutputSpec)
    _refuse_unknown(raw["conformal"], ConformalSpec)
    output = raw["output"]
    return Manifest(
        **{key: str(raw[key]) for key in _SCALARS},
        input=InputSpec(**{key: _tuple(value) for key, value in raw["input"].items()}),
        output=OutputSpec(
            logits=output["logits"],
            bottleneck=output["bottleneck"],
            embedding_dim=output["embedding_dim"],
            label_space=tuple(output["label_space"]),
            label_map={label: Diagnosis(value) for label, value in output["label_map"].items()},
        ),
        calibration=Calibration(**raw["calibration"]),
        conformal=ConformalSpec(
            coverage=raw["conformal"]["coverage"],
            thresholds={Diagnosis(k): float(v) for k, v in raw["conformal"]["thresholds"].items()},
            fitted_on=raw["conformal"]["fitted_on"],
        ),
        ood=OutOfDistributionSpec(**raw["ood"]),
        spaces=tuple(EmbeddingSpaceSpec(**space) for space in raw["spaces"]),
        operating_points={
            name: OperatingPoint(**{**point, "diagnoses": tuple(Diagnosis(d) for d in point["diagnoses"])})
            for name, point in raw["operating_points"].items()
        },
        files={name: FileDigest(**digest) for name, digest in raw["files"].items()},
    )


_SCALARS = ("model_id", "architecture", "tag", "modality", "created", "licence", "training_data", "onnx")


def _refuse_unknown(table: Mapping[str, Any], kind: type) -> None:
    if unknown := set(table) - {field.name for field in fields(kind)}:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")


def _tuple(value: object) -> Any:  # noqa: ANN401 - a TOML value
    return tuple(value) if isinstance(value, list) else value


def _contract_problems(manifest: Manifest) -> Iterator[str]:
    output, conformal = manifest.output, manifest.conformal
    named = {manifest.onnx, manifest.ood.statistics}
    named |= {space.transform for space in manifest.spaces}
    named |= {space.references for space in manifest.spaces}
    if manifest.input.aspect_evidence is not None:
        named.add(manifest.input.aspect_evidence)
    unvouched = ", ".join(sorted(named - set(manifest.files)))
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
        (bool(manifest.spaces), "there is no embedding space"),
        (not unvouched, f"no digest for {unvouched}"),
        # Not-a-number compares false with everything: a rule whose threshold it is would never fire.
        (0 < manifest.calibration.temperature < math.inf, "temperature must be positive"),
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
