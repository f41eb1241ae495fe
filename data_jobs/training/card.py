"""The model card: every number in it is read from the JSON files that the jobs measured.

`python -m data_jobs.training.card --model M` writes it anew and seals the folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from data_jobs.training.manifest_file import seal
from data_jobs.training.model_card.accuracy import (
    accuracy_section,
    calibration_section,
    diagnosis_section,
    subgroup_section,
)
from data_jobs.training.model_card.aspect import aspect_section
from data_jobs.training.model_card.decisions import (
    points_section,
    retrieval_section,
    sets_section,
    unknown_section,
)
from data_jobs.training.model_card.origin import floors_section, head_section, limits_section
from model_store.manifest import read_manifest


def write_card(folder: Path) -> None:
    """Write `MODEL_CARD.md` from manifest.toml, export.json, calibration.json and evaluation.json.

    aspect.json and unknown_methods.json are told where they were measured.
    """
    manifest = read_manifest(folder)
    exported, calibrated, evaluated = (
        _read(folder, name) for name in ("export", "calibration", "evaluation")
    )
    parts = [
        head_section(manifest, exported, evaluated),
        floors_section(evaluated),
        accuracy_section(evaluated),
        diagnosis_section(evaluated),
        calibration_section(manifest.calibration.temperature, evaluated),
        points_section(manifest, evaluated),
        sets_section(evaluated),
        unknown_section(manifest, evaluated, _read_if_measured(folder, "unknown_methods")),
        aspect_section(_read_if_measured(folder, "aspect")),
        retrieval_section(manifest, calibrated, evaluated),
        subgroup_section(exported, evaluated),
        limits_section(calibrated, evaluated),
    ]
    (folder / "MODEL_CARD.md").write_text("\n".join(parts), encoding="utf-8")


def _read(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"{name}.json").read_text()))


def _read_if_measured(folder: Path, name: str) -> dict[str, Any] | None:
    return _read(folder, name) if (folder / f"{name}.json").exists() else None


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    arguments = parser.parse_args()
    folder = arguments.models / arguments.model
    write_card(folder)
    seal(folder)


if __name__ == "__main__":
    main()
