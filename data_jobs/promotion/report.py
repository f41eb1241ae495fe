"""The promotion report: as JSON for the record, as text for whoever approves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
import json
import math
from typing import Any

from data_jobs.promotion.acceptance import Verdict
from data_jobs.promotion.comparison import CaseView, ChangedCase, Comparison
from data_jobs.promotion.figures import Figures
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
    return "\n".join(
        [
            *_changes(comparison),
            "",
            *_figures(comparison.live, comparison.candidate),
            "",
            *_pairs(comparison),
            "",
            *_groups(comparison),
            "",
            *_verdicts(verdicts),
            "",
        ]
    )


def _changes(comparison: Comparison) -> list[str]:
    counts = Counter(kind for case in comparison.changed for kind in case.changes)
    told = ", ".join(f"{kind} {counts[kind]}" for kind in ("top1", "prediction_set", "urgency"))
    downgrades = f"{comparison.malignant_downgrades} of {comparison.malignant_images}"
    upgrades = f"with a more urgent one: {comparison.malignant_upgrades}"
    return [
        f"Changed cases: {len(comparison.changed)} of {comparison.live.images} ({told})",
        f"Malignant images with a less urgent referral: {downgrades}; {upgrades}",
        *(f"  {_change(case)}" for case in sorted(comparison.changed, key=_gravity)),
    ]


def _gravity(case: ChangedCase) -> tuple[bool, bool]:
    """Malignant cases that would be seen later come first, then others that would; false sorts before true."""
    malignant = Diagnosis(case.truth) in MALIGNANT
    return not (case.downgraded and malignant), not case.downgraded


def _change(case: ChangedCase) -> str:
    mark = "  LESS URGENT" if case.downgraded else ""
    return f"{case.isic_id} {case.truth:<4}  {_seen(case.live)}  ->  {_seen(case.candidate)}{mark}"


def _seen(view: CaseView) -> str:
    return f"{view.top1:<4} {{{' '.join(view.prediction_set)}}} {view.urgency or view.outcome}"


def _figures(live: Figures, candidate: Figures) -> list[str]:
    rows = [("figure", "live", "candidate", "change")]
    before, after = asdict(live), asdict(candidate)
    for name, value in before.items():
        change = f"{after[name] - value:+.{0 if isinstance(value, int) else _DIGITS}f}"
        rows.append((name, _number(value), _number(after[name]), change))
    return _columns(rows)


def _pairs(comparison: Comparison) -> list[str]:
    rows = [("McNemar, exact", "pairs", "lost", "gained", "p")]
    for name, pairs in comparison.paired.items():
        rows.append((name, str(pairs.cases), str(pairs.lost), str(pairs.gained), f"{pairs.p_value:.3g}"))
    return _columns(rows)


def _groups(comparison: Comparison) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("subgroup", "images", "top-1 live", "candidate", "melanoma AUC live", "candidate")
    ]
    for name, group in comparison.subgroups.items():
        figures = (
            group.live_top1,
            group.candidate_top1,
            group.live_melanoma_auc,
            group.candidate_melanoma_auc,
        )
        rows.append((name, str(group.images), *(_number(figure) for figure in figures)))
    return _columns(rows)


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    rows = [("criterion", "limit", "measured", "")]
    for verdict in verdicts:
        kept = "kept" if verdict.kept else "FAILED"
        rows.append((verdict.criterion, _number(verdict.limit), _number(verdict.measured), kept))
    return _columns(rows)


def _number(value: int | float) -> str:  # noqa: PYI041 - counts are written otherwise
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.{_DIGITS}f}"


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
