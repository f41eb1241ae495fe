"""Three pictures for the model card, from the figures alone; colours that the colour-blind tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from serve_app.domain.diagnosis import TRAINED, Diagnosis

CONFUSION_NAME = "confusion.png"
RELIABILITY_NAME = "reliability.png"
MELANOMA_NAME = "melanoma.png"


_DPI = 110
# Okabe and Ito, "Color Universal Design", 2008.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"


def draw_all(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the three PNGs of an evaluation's figures into a model folder."""
    draw_confusion(folder / CONFUSION_NAME, report["confusion"], report["fold"])
    draw_reliability(folder / RELIABILITY_NAME, report)
    draw_melanoma(folder / MELANOMA_NAME, report)


def draw_confusion(path: Path, confusion: Mapping[str, Sequence[int]], fold: int) -> None:
    """Counts, coloured by their share of the row: the diagonal's colour is the recall."""
    counts = np.array([confusion[d.value] for d in TRAINED])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(7.2, 5.6), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="cividis", vmin=0.0, vmax=1.0)
    for row in range(counts.shape[0]):
        for column in range(counts.shape[1]):
            colour = "black" if shares[row, column] > 0.55 else "white"
            axes.text(
                column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=9
            )
    axes.set_xticks(range(len(Diagnosis)), [d.value for d in Diagnosis])
    axes.set_yticks(
        range(len(TRAINED)), [f"{d.value} ({n})" for d, n in zip(TRAINED, counts.sum(1), strict=True)]
    )
    axes.set_xlabel("first answer")
    axes.set_ylabel("diagnosis in the archive (images)")
    axes.set_title(f"Confusion matrix, fold {fold}")
    figure.colorbar(image, ax=axes, label="share of the diagnosis's images")
    _save(figure, path)


def draw_reliability(path: Path, report: Mapping[str, Any]) -> None:
    """Probability told against share found, for the first answer and for melanoma; images below."""
    kinds = (
        ("first_answer", "first answer", _BLUE, "o"),
        ("melanoma", "melanoma", _ORANGE, "s"),
    )
    figure = Figure(figsize=(5.6, 6.0), dpi=_DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color=_GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    for key, name, colour, marker in kinds:
        bins = report["reliability"][key]
        told = [b["told"] for b in bins]
        upper.plot(told, [b["found"] for b in bins], color=colour, marker=marker, label=name, clip_on=False)
        lower.plot(told, [b["images"] for b in bins], color=colour, marker=marker, linewidth=1)
    upper.set_ylabel("share that came true")
    upper.set_title(f"Reliability, fold {report['fold']} (ECE {report['with_unk']['ece']:.3f})")
    upper.legend(loc="upper left", frameon=False)
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    upper.grid(visible=True, alpha=0.3)
    lower.set_yscale("log")
    lower.set_xlabel("probability told")
    lower.set_ylabel("images in bin")
    lower.grid(visible=True, alpha=0.3)
    _save(figure, path)


def draw_melanoma(path: Path, report: Mapping[str, Any]) -> None:
    """Sensitivity against specificity by lesion, with the operating point and the sensitivity required."""
    curve, point = report["melanoma_curve"], report["operating_points"]["melanoma"]
    figure = Figure(figsize=(5.6, 5.2), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.step(
        [1.0, *curve["specificity"], 0.0],
        [0.0, *curve["sensitivity"], 1.0],
        where="post",
        color=_BLUE,
        label=f"p(MEL) by lesion, AUC {curve['auc']:.3f}",
    )
    axes.plot(
        point["specificity"], point["sensitivity"], "o", color=_ORANGE, markersize=9,
        label=f"operating point: {point['sensitivity']:.3f} at {point['specificity']:.3f}",
    )  # fmt: skip
    axes.axhline(0.95, color=_GREY, linestyle="--", linewidth=1, label="sensitivity 0.95")
    axes.set_xlim(1.0, 0.0)
    axes.set_ylim(0.0, 1.02)
    axes.set_xlabel("specificity")
    axes.set_ylabel("sensitivity")
    lesions = point["positives"] + point["negatives"]
    axes.set_title(f"Fold {report['fold']}: {point['positives']} melanomas among {lesions} lesions")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib equal figures give equal files, and so equal digests.
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
