"""The model card: every number in it is read from the JSON files that the jobs measured; its text is `MODEL_CARD.md.j2`.

`python -m data_jobs.training.card --model M` writes it anew and seals the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_jobs.training.manifest_file import seal
from model_store.manifest import read_manifest
from serve_app.domain.diagnosis import TRAINED, Diagnosis

CARD_NAME = "MODEL_CARD.md"


def write_card(folder: Path) -> None:
    """Write `MODEL_CARD.md` from manifest.toml, export.json, calibration.json and evaluation.json."""
    exported, calibrated, evaluated = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("export", "calibration", "evaluation")
    )
    # Markdown, which nobody's browser runs.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"told": format, "between": between, "dash": dash, "share": share}
    card = environment.get_template(f"{CARD_NAME}.j2").render(
        manifest=read_manifest(folder),
        exported=exported,
        calibrated=calibrated,
        evaluated=evaluated,
        trained=TRAINED,
        diagnoses=tuple(Diagnosis),
    )
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def share(counts: Mapping[str, int], name: str) -> str:
    """`47.1 %` of the cases, or a dash where there is none."""
    return f"{100 * counts[name] / counts['cases']:.1f} %" if counts["cases"] else "–"


def between(value: float | None, interval: Sequence[float | None]) -> str:
    """`0.791 (0.772 to 0.809)`, or a dash for a figure that the images do not give."""
    if value is None or None in interval:
        return "–"
    low, high = interval
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def dash(value: float | None) -> object:
    """The figure, or a dash where the images do not give it."""
    return "–" if value is None else value


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
