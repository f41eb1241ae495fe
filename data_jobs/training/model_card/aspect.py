"""The aspect proof: the same images in their own shape and squashed beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_jobs.training.model_card.table import share, table


def aspect_section(proof: Mapping[str, Any] | None) -> str:
    """Agreement and accuracy both ways; says so where it was not measured."""
    if proof is None:
        return "## Aspect\n\nNot measured for this model: `python -m data_jobs.training.aspect`.\n"
    agreement = [_agreement(name, pair) for name, pair in proof["agreement"].items()]
    figures = ("images", "top1", "balanced_accuracy", "melanoma_auc", "ece")
    accuracy = [
        (f"{part}, {way}", *(share(f[n]) for n in figures))
        for part, ways in proof["accuracy"].items()
        for way, f in ways.items()
    ]
    head = (
        "against its own shape",
        "images",
        "same first answer",
        "mean |Δp|",
        "|Δp(MEL)| median",
        "95 %",
        "largest",
    )
    return f"""## Aspect

Decided: **squash**. Every image becomes a square whatever its shape. The archive's {proof["images"]} files of true aspect, as they are and
squashed beforehand into a square file of the archive's kind, both scored by the served code:

{table(head, agreement)}
Letter-boxed and cropped files are what a sender might do; they are not what the archive holds.

{table(("", *figures), accuracy)}"""


def _agreement(name: str, pair: Mapping[str, Any]) -> tuple[object, ...]:
    melanoma = pair["melanoma_change"]
    return (
        name,
        pair["images"],
        f"{pair['top1_agreement']:.2%}",
        pair["mean_change"],
        melanoma["0.5"],
        melanoma["0.95"],
        melanoma["1.0"],
    )
