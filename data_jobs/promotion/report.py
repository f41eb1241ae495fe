"""The promotion report: as JSON for the record, as text for whoever approves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_jobs.promotion.acceptance import Verdict
from data_jobs.promotion.comparison import Comparison
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis

_DIGITS = 4


def report_content(
    comparison: Comparison, verdicts: Sequence[Verdict], circumstances: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole report as plain tables; `circumstances` say which models, cases, policy, and who asks."""
    content = {
        **circumstances,
        "accepted": all(verdict.kept for verdict in verdicts),
        "acceptance": [asdict(verdict) for verdict in verdicts],
        "figures": {"live": asdict(comparison.live), "candidate": asdict(comparison.candidate)},
        "mcnemar": {name: asdict(pairs) for name, pairs in comparison.paired.items()},
        "malignant_images": comparison.malignant_images,
        "malignant_downgrades": comparison.malignant_downgrades,
        "malignant_upgrades": comparison.malignant_upgrades,
        "subgroups": {name: asdict(group) for name, group in comparison.subgroups.items()},
        "changed": [
            {**asdict(case), "changes": case.changes, "downgraded": case.downgraded}
            for case in comparison.changed
        ],
    }
    rounded: dict[str, Any] = _rounded(content)
    return rounded


def to_json(content: Mapping[str, Any]) -> str:
    """The report as it is kept; the same content, the same bytes."""
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _rounded(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        # p-values of large samples are far below four digits
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


def to_text(comparison: Comparison, verdicts: Sequence[Verdict]) -> str:
    """What changes, the figures, the groups and the verdict, for a terminal of 100 columns."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - for a terminal
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    return environment.get_template("report.txt.j2").render(
        comparison=comparison,
        kinds=Counter(kind for case in comparison.changed for kind in case.changes),
        # Malignant cases that would be seen later come first, then others that would; false sorts before true.
        changed=sorted(
            comparison.changed,
            key=lambda case: (
                not (case.downgraded and Diagnosis(case.truth) in MALIGNANT),
                not case.downgraded,
            ),
        ),
        live=asdict(comparison.live),
        candidate=asdict(comparison.candidate),
        verdicts=verdicts,
    )


def _number(value: float, sign: str = "") -> str:
    if isinstance(value, int):
        return f"{value:{sign}}"
    return "-" if math.isnan(value) else f"{value:{sign}.{_DIGITS}f}"
