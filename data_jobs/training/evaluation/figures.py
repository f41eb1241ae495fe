"""Accuracy over all, by diagnosis, lesion and subgroup and as the ISIC challenges count; sets, curves, and 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom
from sklearn import metrics

from data_jobs.training.evaluation.predictions import MELANOMA, UNKNOWN, Predictions
from data_jobs.training.operating_points import by_lesion, lower_bound
from data_jobs.training.probabilities import (
    Floats,
    Labels,
    area_under_curve,
    balanced_accuracy,
    calibration_error,
    class_precision,
    class_recall,
    log_loss,
    top_k_accuracy,
)
from serve_app.domain.diagnosis import TRAINED, Diagnosis

CLASSES = len(TRAINED)


def accuracy_figures(probabilities: Floats, labels: Labels) -> dict[str, float]:
    """Figures of N×9 (or N×8) probabilities; a first answer of UNK is wrong."""
    return {
        "images": len(labels),
        "top1": round(top_k_accuracy(probabilities, labels, 1), 4),
        "top3": round(top_k_accuracy(probabilities, labels, 3), 4),
        "balanced_accuracy": round(balanced_accuracy(probabilities, labels, CLASSES), 4),
        "melanoma_auc": round(area_under_curve(probabilities[:, MELANOMA], labels == MELANOMA), 4),
        "ece": round(calibration_error(probabilities, labels), 4),
        "log_loss": round(log_loss(probabilities, labels), 4),
    }


def diagnosis_figures(predictions: Predictions) -> dict[str, Any]:
    """Images, recall, precision (nine classes), one-vs-rest AUC (eight) and confusion row of every diagnosis."""
    labels, nine, eight = predictions.labels, predictions.nine, predictions.eight
    return {
        "images_a_class": {d.value: int((labels == i).sum()) for i, d in enumerate(TRAINED)},
        "recall": by_diagnosis(class_recall(nine, labels, CLASSES)),
        "precision": by_diagnosis(class_precision(nine, labels, CLASSES)),
        "auc": by_diagnosis(np.array([area_under_curve(eight[:, i], labels == i) for i in range(CLASSES)])),
        "confusion": {
            d.value: row.tolist() for d, row in zip(TRAINED, confusion_matrix(nine, labels), strict=True)
        },
    }


def by_diagnosis(values: Floats) -> dict[str, float]:
    """One value a trained diagnosis, by its code."""
    return {d.value: round(float(v), 4) for d, v in zip(TRAINED, values, strict=True)}


def confusion_matrix(nine: Floats, labels: Labels) -> NDArray[np.int64]:
    """8×9 counts: the diagnosis in the archive by the first answer."""
    found = metrics.confusion_matrix(labels, nine.argmax(1), labels=range(len(Diagnosis)))
    return np.asarray(found[:CLASSES])


def lesion_predictions(predictions: Predictions) -> Predictions:
    """One answer a lesion: the mean of its images' probabilities and scores, under its first image's row.

    A lesion with a diagnosis for one image and another for the next counts once for each.
    """
    keys = [f"{row.lesion} {row.diagnosis}" for row in predictions.rows]
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    nine = np.zeros((len(first), predictions.nine.shape[1]))
    scores = np.zeros(len(first))
    np.add.at(nine, inverse, predictions.nine)
    np.add.at(scores, inverse, predictions.scores)
    rows = [predictions.rows[i] for i in first]
    return Predictions(rows, nine / counts[:, None], scores / counts)


def lesion_figures(predictions: Predictions) -> dict[str, float]:
    """`accuracy_figures` by lesion; `images` is replaced by `lesions`."""
    lesions = lesion_predictions(predictions)
    figures = accuracy_figures(lesions.nine, lesions.labels)
    return {"lesions": figures.pop("images"), **figures}


def lesion_diagnosis_figures(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Lesions, recall and precision of every diagnosis, by lesion."""
    figures = diagnosis_figures(lesion_predictions(predictions))
    return {
        "lesions_a_class": figures["images_a_class"],
        "recall": figures["recall"],
        "precision": figures["precision"],
    }


#: Groups with fewer images are left out: their figures would be noise.
SMALLEST = 30


def subgroup_figures(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Figures (nine classes) by image source, aspect, resolution, confirmation, sex, age and body site."""
    rows = predictions.rows
    values = {
        "source": ["HAM10000" if ham else "other" for ham in predictions.of_ham10000],
        "aspect": [row.aspect for row in rows],
        "short side": ["under 224" if min(row.width, row.height) < 224 else "224 or more" for row in rows],
        "confirmed by": [row.diagnosis_confirm_type or "unknown" for row in rows],
        "sex": [row.sex or "unknown" for row in rows],
        "age": [age_band(row.age_approx) for row in rows],
        "site": [row.anatom_site_general or "unknown" for row in rows],
    }
    nine, labels = predictions.nine, predictions.labels
    return {
        name: accuracy_figures(nine[picked], labels[picked])
        for name, picked in split(values).items()
        if picked.sum() >= SMALLEST
    }


def split(values: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.bool_]]:
    """Which of N images belong to which group, `kind: value`, from the values of every kind."""
    return {
        f"{kind}: {value}": np.array([v == value for v in found])
        for kind, found in values.items()
        for value in sorted(set(found))
    }


def age_band(age: int | None) -> str:
    """Under 40, 40 to 59, 60 or more years, or unknown."""
    if age is None:
        return "unknown"
    return "under 40" if age < 40 else "40 to 59" if age < 60 else "60 or more"


#: Sensitivities at which the specificity is told.
READINGS = (0.80, 0.85, 0.90, 0.95, 0.975, 0.99, 1.0)
BINS = 15


def melanoma_curve(predictions: Predictions) -> dict[str, Any]:
    """Sensitivity and specificity of p(MEL) by lesion, at every threshold that changes the sensitivity.

    As for the operating points, a melanoma counts by its lowest image and any other lesion by its
    highest. It describes the fold it is measured on; no threshold is taken from it.
    """
    labels = predictions.labels
    scores, positive = by_lesion(predictions.eight[:, MELANOMA], labels == MELANOMA, predictions.lesions)
    thresholds, sensitivity, specificity = sensitivity_specificity(scores, positive)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    readings = []
    for wanted in READINGS:
        at = int(np.flatnonzero(sensitivity >= wanted - 1e-12)[0])
        hits = round(float(sensitivity[at]) * positives)
        readings.append(
            {
                "threshold": round(float(thresholds[at]), 6),
                "hits": hits,
                "positives": positives,
                "sensitivity": round(hits / positives, 4),
                "lower_bound": round(lower_bound(hits, positives), 4),
                "negatives": negatives,
                "specificity": round(float(specificity[at]), 4),
            }
        )
    return {
        "auc": round(area_under_curve(scores, positive), 4),
        "readings": readings,
        "threshold": [round(float(t), 5) for t in thresholds],
        "sensitivity": [round(float(s), 4) for s in sensitivity],
        "specificity": [round(float(s), 4) for s in specificity],
    }


def sensitivity_specificity(scores: Floats, positive: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """Thresholds, falling, with the sensitivity and specificity of `score >= threshold`.

    One threshold for every distinct score of a positive. Raises ValueError without both kinds.
    """
    if positive.all() or not positive.any():
        raise ValueError("A curve needs positives and negatives.")
    false_alarms, sensitivity, thresholds = metrics.roc_curve(positive, scores, drop_intermediate=False)
    rises = np.flatnonzero(np.diff(sensitivity) > 0.0) + 1
    return thresholds[rises], sensitivity[rises], 1.0 - false_alarms[rises]


def reliability(predictions: Predictions) -> dict[str, list[dict[str, float]]]:
    """Told against found, in 15 equal bins: the first answer's probability, and p(MEL)."""
    nine, labels = predictions.nine, predictions.labels
    return {
        "first_answer": reliability_bins(nine.max(1), nine.argmax(1) == labels),
        "melanoma": reliability_bins(predictions.eight[:, MELANOMA], labels == MELANOMA),
    }


def reliability_bins(told: Floats, came_true: NDArray[np.bool_], bins: int = BINS) -> list[dict[str, float]]:
    """Mean probability told and share that came true, of every bin that holds an image."""
    index = np.minimum((told * bins).astype(int), bins - 1)
    return [
        {
            "images": int(inside.sum()),
            "told": round(float(told[inside].mean()), 4),
            "found": round(float(came_true[inside].mean()), 4),
        }
        for b in range(bins)
        if (inside := index == b).any()
    ]


#: ISIC 2018 task 3: actinic keratosis and squamous cell carcinoma in situ are one class, AKIEC.
SEVEN = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_MERGED = {Diagnosis.AK: "AKIEC", Diagnosis.SCC: "AKIEC"}
_SEVEN_OF_EIGHT = np.array([SEVEN.index(_MERGED.get(d, d.value)) for d in TRAINED])


def challenge_figures(predictions: Predictions) -> dict[str, Any]:
    """Eight classes over the whole fold, seven over its HAM10000 images; UNK first counts as wrong in both."""
    ham = predictions[predictions.of_ham10000]
    refused = ham.nine.argmax(1) == UNKNOWN
    return {
        "isic2019_eight": scored(
            predictions.eight,
            predictions.labels,
            predictions.nine.argmax(1) == UNKNOWN,
            tuple(d.value for d in TRAINED),
        ),
        "isic2018_seven_ham10000": scored(
            merge_to_seven(ham.eight), _SEVEN_OF_EIGHT[ham.labels], refused, SEVEN
        ),
    }


def merge_to_seven(eight: Floats) -> Floats:
    """N×7 probabilities in the order of SEVEN: p(AKIEC) = p(AK) + p(SCC)."""
    seven = np.zeros((len(eight), len(SEVEN)))
    for index, target in enumerate(_SEVEN_OF_EIGHT):
        seven[:, target] += eight[:, index]
    return seven


def scored(known: Floats, labels: Labels, refused: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Figures of an N×C table as the ISIC challenges count them.

    A refused image's row is all zeros: the challenges' own code calls such a tie undecided, and so
    wrong, and in every AUC it ranks last. That code gave the same figures for derm1 to derm9.
    """
    table = np.where(refused[:, None], 0.0, known)
    # UNK as one more class: argmax of a row of zeros must not be the first diagnosis.
    answers = np.concatenate([table, refused[:, None].astype(np.float64)], axis=1)
    auc = {name: area_under_curve(table[:, c], labels == c) for c, name in enumerate(names)}
    return {
        "images": len(labels),
        "refused": int(refused.sum()),
        "top1": round(top_k_accuracy(answers, labels, 1), 4),
        "balanced_accuracy": round(balanced_accuracy(answers, labels, len(names)), 4),
        "auc": {name: round(value, 4) for name, value in auc.items()},
        "mean_auc": round(float(np.nanmean(list(auc.values()))), 4),
    }


def set_figures(
    predictions: Predictions, thresholds: Floats, coverage: float, calibration_images: Mapping[str, int]
) -> dict[str, Any]:
    """Coverage of every class beside the range that chance allows, and the sizes of the sets.

    `calibration_images` are those that each class's threshold was found on.
    """
    labels = predictions.labels
    sets = predictions.eight >= thresholds
    size = sets.sum(1)
    classes = {}
    for index, diagnosis in enumerate(TRAINED):
        images, covered = int((labels == index).sum()), int(sets[labels == index, index].sum())
        low, high = coverage_range(calibration_images[diagnosis.value], images, coverage)
        classes[diagnosis.value] = {
            "calibration_images": calibration_images[diagnosis.value],
            "images": images,
            "covered": covered,
            "coverage": round(covered / images, 4) if images else float("nan"),
            "range": [low, high],
            "within_range": low <= covered <= high,
        }
    return {
        "nominal_coverage": coverage,
        "coverage": round(float(sets[np.arange(len(labels)), labels].mean()), 4),
        "classes": classes,
        "mean_size": round(float(size.mean()), 3),
        "share_of_one": round(float((size == 1).mean()), 4),
        "share_empty": round(float((size == 0).mean()), 4),
    }


def coverage_range(
    calibration_images: int, images: int, coverage: float, share: float = 0.95
) -> tuple[int, int]:
    """Fewest and most of `images` new ones that are covered, in the middle `share` of all splits.

    With the k-th smallest of n calibration scores as threshold, coverage over splits is
    Beta(n + 1 - k, k) and the count of covered images beta-binomial (Vovk, ACML 2012, prop. 2a;
    Angelopoulos and Bates 2023, 3.2): a class of few calibration images may fall far from its
    promise by chance alone. It takes images as independent, which those of one lesion are not.
    """
    k = math.floor((1.0 - coverage) * (calibration_images + 1) + 1e-9)
    if k == 0:
        return images, images
    found = betabinom(images, calibration_images + 1 - k, k)
    tail = (1.0 - share) / 2.0
    return int(found.ppf(tail)), int(found.ppf(1.0 - tail))


#: Lesions are drawn again, not images, for images of one lesion are alike.
RESAMPLES = 1000
Interval = tuple[float, float]


def bootstrap_intervals(predictions: Predictions, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Percentile intervals (Efron and Tibshirani 1993, 13.3) of the figures of the nine classes.

    Keys: top1, top3, balanced_accuracy, melanoma_auc, ece, and by diagnosis recall, precision
    and auc. A diagnosis without a first answer in a resample has no precision there, and one
    without any image no recall: such resamples are left out of its interval. The ECE is a sum of
    absolute values, to which every resample adds noise: its interval lies high.
    """
    labels, nine = predictions.labels, predictions.nine
    weights = resampled_weights(predictions.lesions, resamples, seed)
    best = np.argsort(-nine, axis=1, kind="stable")
    answer, hit = best[:, 0], best[:, 0] == labels
    in_three = (best[:, :3] == labels[:, None]).any(1)
    total = weights.sum(1)
    recall = np.stack([_share(weights, hit, labels == c) for c in range(len(TRAINED))])
    precision = np.stack([_share(weights, hit, answer == c) for c in range(len(TRAINED))])
    eight = predictions.eight
    auc = [weighted_auc(eight[:, c], labels == c, weights) for c in range(len(TRAINED))]
    return {
        "resamples": resamples,
        "top1": interval(weights @ hit / total),
        "top3": interval(weights @ in_three / total),
        "balanced_accuracy": interval(np.nanmean(recall, axis=0)),
        "melanoma_auc": interval(weighted_auc(nine[:, MELANOMA], labels == MELANOMA, weights)),
        "ece": interval(weighted_calibration_error(nine, labels, weights)),
        "recall": _by_diagnosis(recall),
        "precision": _by_diagnosis(precision),
        "auc": _by_diagnosis(auc),
    }


def resampled_weights(lesions: list[str], resamples: int, seed: int) -> Floats:
    """R×N: how often each image is in each resample, as its lesion was drawn."""
    _, inverse = np.unique(lesions, return_inverse=True)
    count = int(inverse.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    return np.asarray(drawn[:, inverse], np.float64)


def weighted_auc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """AUROC of every resample, ties counted half; NaN where one kind was not drawn."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0.0)
    ordered, kind = weights[:, order], positive[order]
    up = np.add.reduceat(ordered * kind, starts, axis=1)
    down = np.add.reduceat(ordered * ~kind, starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2.0
    pairs = up.sum(1) * down.sum(1)
    result: Floats = np.where(pairs > 0, (up * below).sum(1) / np.where(pairs > 0, pairs, 1.0), np.nan)
    return result


def weighted_calibration_error(
    probabilities: Floats, labels: Labels, weights: Floats, bins: int = 15
) -> Floats:
    """`probabilities.calibration_error` of every resample."""
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - confidence
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    error = np.zeros(len(weights))
    for b in range(bins):
        inside = index == b
        error += np.abs(weights[:, inside] @ gap[inside])
    result: Floats = error / weights.sum(1)
    return result


def interval(values: Floats) -> Interval:
    """The middle 95 % of the resampled values; NaN when there is none."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


def _share(weights: Floats, hit: NDArray[np.bool_], among: NDArray[np.bool_]) -> Floats:
    """Share of hits among some images in every resample; NaN where none of them was drawn."""
    drawn = weights @ among
    result: Floats = np.where(drawn > 0, weights @ (hit & among) / np.where(drawn > 0, drawn, 1.0), np.nan)
    return result


def _by_diagnosis(values: NDArray[np.float64] | list[Floats]) -> dict[str, Interval]:
    return {d.value: interval(v) for d, v in zip(TRAINED, values, strict=True)}
