"""Accuracy, diagnoses, calibration and subgroups of the test fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_jobs.training.model_card.pictures import CONFUSION_NAME, RELIABILITY_NAME
from data_jobs.training.model_card.table import between, share, table
from serve_app.domain.diagnosis import TRAINED, Diagnosis

_DIAGNOSIS_HEAD = (
    "diagnosis",
    "images",
    "recall",
    "precision",
    "AUC, one against the rest",
    "lesions",
    "recall by lesion",
    "precision by lesion",
)


def accuracy_section(evaluated: Mapping[str, Any]) -> str:
    """By image and by lesion, with and without UNK, and as the ISIC challenges count."""
    names = ("top1", "top3", "balanced_accuracy", "melanoma_auc", "ece", "log_loss")
    kinds = {
        "images, nine classes, UNK counts as wrong": ("with_unk", "images"),
        "images, eight classes, UNK left out": ("without_unk", "images"),
        "lesions, nine classes (mean of a lesion's images)": ("by_lesion", "lesions"),
        "images of HAM10000, nine classes": ("ham10000", "images"),
    }
    rows = [
        (kind, evaluated[key][count], *(evaluated[key][name] for name in names))
        for kind, (key, count) in kinds.items()
    ]
    told = ("top1", "top3", "balanced_accuracy", "melanoma_auc", "ece")
    spans = [
        (kind, *(between(evaluated[key][n], evaluated[intervals][n]) for n in told))
        for kind, key, intervals in (
            ("all images", "with_unk", "intervals"),
            ("HAM10000", "ham10000", "ham10000_intervals"),
        )
    ]
    return f"""## Accuracy on fold 0

{table(("", "n", *names), rows)}
With 95 % intervals (bootstrap over lesions, {evaluated["intervals"]["resamples"]} resamples; that of the ECE lies high, for chance adds to it), nine classes:

{table(("", *told), spans)}
{_challenge(evaluated["challenge"])}"""


def _challenge(challenge: Mapping[str, Any]) -> str:
    kinds = {
        "ISIC 2019, eight classes, fold 0": challenge["isic2019_eight"],
        "ISIC 2018, seven classes (AK + SCC = AKIEC), HAM10000 of fold 0": challenge[
            "isic2018_seven_ham10000"
        ],
    }
    rows = []
    for kind, ours in kinds.items():
        official = ours["official"] or {"balanced_accuracy": "–", "mean_auc": "–"}
        rows.append(
            (
                kind,
                ours["images"],
                ours["refused"],
                ours["top1"],
                ours["balanced_accuracy"],
                official["balanced_accuracy"],
                ours["mean_auc"],
                official["mean_auc"],
            )
        )
    head = ("", "images", "UNK first", "top1", "balanced accuracy", "(official)", "mean AUC", "(official)")
    package = next(
        (o["official"]["package"] for o in kinds.values() if o["official"]),
        "no official score: not installed, or a class without images",
    )
    return f"""As the ISIC challenges count, an image with UNK first being wrong and last in every ranking; beside it what the challenges' own
code ({package}) gives for the same table:

{table(head, rows)}"""


def diagnosis_section(evaluated: Mapping[str, Any]) -> str:
    """Recall, precision and AUC with intervals, and the confusion matrix."""
    spans, lesions = evaluated["intervals"], evaluated["diagnosis_by_lesion"]
    rows = [
        (
            d.display_name,
            evaluated["images_a_class"][d],
            between(evaluated["recall"][d], spans["recall"][d]),
            between(evaluated["precision"][d], spans["precision"][d]),
            between(evaluated["auc"][d], spans["auc"][d]),
            lesions["lesions_a_class"][d],
            share(lesions["recall"][d]),
            share(lesions["precision"][d]),
        )
        for d in TRAINED
    ]
    confusion = [(d.value, *evaluated["confusion"][d]) for d in TRAINED]
    return f"""## By diagnosis

{table(_DIAGNOSIS_HEAD, rows)}
In brackets 95 % intervals (bootstrap over lesions; too narrow where all or none of a few images were hit). First answers (columns) by
diagnosis in the archive (rows):

{table(("", *(f"→ {d}" for d in Diagnosis)), confusion)}
![Confusion matrix]({CONFUSION_NAME})
"""


def calibration_section(manifest_temperature: float, evaluated: Mapping[str, Any]) -> str:
    """Reliability of the first answer and of p(MEL)."""
    rows = [
        (name, b["images"], b["told"], b["found"])
        for name, key in (("first answer", "first_answer"), ("melanoma", "melanoma"))
        for b in evaluated["reliability"][key]
        if b["images"] >= 20
    ]
    low, high = evaluated["intervals"]["ece"]
    return f"""## Calibration

Temperature {manifest_temperature}. Expected calibration error on fold 0 {evaluated["with_unk"]["ece"]:.4f} ({low:.4f} to {high:.4f}; 15 equal bins, first of nine).
Bins of 20 images and more:

{table(("probability of", "images", "mean told", "share found"), rows)}
![Reliability diagram]({RELIABILITY_NAME})
"""


def subgroup_section(exported: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    """Input sides, softening, and the groups that the archive tells apart."""
    names = ("images", "top1", "balanced_accuracy", "melanoma_auc", "ece")
    groups = [(group, *(share(f[n]) for n in names)) for group, f in evaluated["subgroups"].items()]
    sides = [[round(value, 4) for value in side.values()] for side in exported["sides"]]
    soft = evaluated["softened"]
    return f"""## Input size, softening, subgroups

Input side, measured on the calibration fold (the smallest within half a point of the best was taken):

{table(exported["sides"][0], sides)}
A light blur (0.7 pixels) leaves the first answer unchanged in {soft["top1_agreement"]:.1%} of fold 0 and gives top-1 {soft["top1"]}.

{table(("fold 0", *names), groups)}"""
