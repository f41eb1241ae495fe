"""`manifest.toml` of a calibrated model: what it says, and the writing of it, which seals a folder."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
import tomllib
from typing import Any

import tomli_w

from data_jobs.training.ensemble import Ensemble
from data_jobs.training.operating_points import POINTS, ChosenThreshold
from data_jobs.training.probabilities import Floats
from model_store.canary import CANARY_NAME
from model_store.manifest import EMBEDDING_DIM, MANIFEST_NAME, Manifest, read_manifest
from model_store.registry import digest_file, verify_files
from serve_app.domain.diagnosis import TRAINED

COVERAGE = 0.95


def manifest_content(
    ensemble: Ensemble,
    side: int,
    fitted: Mapping[str, Any],
    points: Mapping[str, ChosenThreshold],
    thresholds: Floats,
    space: str,
) -> dict[str, Any]:
    """The manifest as plain tables, without digests."""
    members, recipe = len(ensemble.members), ensemble.members[0]
    folds = sorted(member.data.fitted_fold for member in ensemble.members)
    fold = f"fold {' and '.join(map(str, folds))} of the archive's lesion-grouped folds"
    if members > 1:
        fold += ", each by the member that left it out"
    trained_on = sorted({f for m in ensemble.members for f in m.data.train_folds if f != m.data.left_out})
    space_name = f"{ensemble.model_id}.{space}1"
    return {
        "model_id": ensemble.model_id,
        "architecture": ensemble.architecture,
        "tag": ensemble.tag,
        "modality": "dermoscopic",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "licence": "CC-BY-NC-4.0",
        "training_data": (
            "ISIC archive: HAM10000, ISIC challenges 2017, 2018, 2020, UDA-1; "
            f"folds {', '.join(map(str, trained_on))}, {fitted['training_images']} images"
            + (" (members left one fold out each); BCN20000 at 84 px" if recipe.data.with_bcn84 else "")
        ),
        "onnx": "model.onnx",
        "input": {
            "name": "pixels",
            "input_size": [3, side, side],
            "mean": list(recipe.network.channel_mean),
            "std": list(recipe.network.channel_std),
            "interpolation": recipe.data.interpolation,
            "crop_pct": 1.0,
            "aspect": "squash",
        },
        "output": {
            "logits": "logits",
            "bottleneck": "bottleneck",
            "embedding_dim": EMBEDDING_DIM,
            "label_space": [d.value for d in TRAINED],
            "label_map": {d.value: d.value for d in TRAINED},
        }
        | ({"member_logits": "member_logits", "members": members} if members > 1 else {})
        | ({"unknown": "unknown"} if fitted["graph_scores_unknown"] else {}),
        "calibration": {"temperature": fitted["temperature"], "fitted_on": fold}
        | ({"member_temperature": fitted["member_temperature"]} if members > 1 else {}),
        "conformal": {
            "coverage": COVERAGE,
            "fitted_on": fold,
            "thresholds": {d.value: float(t) for d, t in zip(TRAINED, thresholds, strict=True)},
        },
        "ood": {
            "slope": fitted["slope"],
            "intercept": fitted["intercept"],
            "fitted_on": f"{fold}, against clinical photographs, other departments' images, scenes and drawings",
        }
        | (
            {"method": "ridge logistic regression on all levels of the network, and distance to the known"}
            if fitted["graph_scores_unknown"]
            else {
                "method": "mahalanobis, shared covariance, with a direction fitted to outliers",
                "statistics": "ood.npz",
            }
        ),
        "spaces": [
            {
                "embedding_space": space_name,
                "transform": f"{space_name}.npz",
                "references": "references.parquet",
                "count": 0,
            }
        ],
        "operating_points": {
            name: {
                "diagnoses": [d.value for d in POINTS[name]],
                "threshold": point.threshold,
                "sensitivity": round(point.sensitivity, 4),
                "specificity": round(point.specificity, 4),
                "positives": point.positives,
                "misses": point.misses,
                "fitted_on": f"{fold}, by lesion",
            }
            for name, point in points.items()
        },
    }


def write_manifest(folder: Path, content: Mapping[str, Any]) -> Manifest:
    """Write `content` with the digests of all files of the folder but the canary, and read it back.

    `content` is the manifest as plain tables, `files` left out. Raises ModelContractError when
    what was written does not load.
    """
    write_digests(folder, content)
    manifest = read_manifest(folder)
    verify_files(folder, manifest.files)
    return manifest


def write_digests(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `content` with the digests of all files of the folder but the canary."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in (MANIFEST_NAME, CANARY_NAME)
    }
    partial = folder / f".{MANIFEST_NAME}.partial"
    partial.write_text(tomli_w.dumps({**content, "files": files}), encoding="utf-8")
    partial.rename(folder / MANIFEST_NAME)


def seal(folder: Path, *, references: int | None = None) -> Manifest:
    """Write the digests anew after files of the folder changed; `references` is the new count."""
    with (folder / MANIFEST_NAME).open("rb") as file:
        content = tomllib.load(file)
    content.pop("files")
    if references is not None:
        content["spaces"][0]["count"] = references
    return write_manifest(folder, content)
