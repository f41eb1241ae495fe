"""Accuracy over all, by diagnosis, lesion and subgroup and as the ISIC challenges count; sets, curves, and 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom
from sklearn import metrics

from data_jobs.training.dataset import ARCHIVE, BCN84, LabelledImage, labels_of, of_ham10000
from data_jobs.training.evaluation.predictions import MELANOMA, UNKNOWN, Predictions
from data_jobs.training.operating_points import lesion_scores, measure_threshold
from data_jobs.training.probabilities import (
    Floats,
    Labels,
    area_under_curve,
    balanced_accuracy,
    calibration_error,
    log_loss,
    rounded,
    top_k_accuracy,
    weighted_calibration_error,
)
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis

CLASSES = len(TRAINED)


def accuracy_figures(probabilities: Floats, labels: Labels) -> dict[str, float]:
    """Figures of N×9 (or N×8) probabilities; a first answer of UNK is wrong."""
    return {
        "images": len(labels),
        "top1": rounded(top_k_accuracy(probabilities, labels, 1)),
        "top3": rounded(top_k_accuracy(probabilities, labels, 3)),
        "balanced_accuracy": rounded(balanced_accuracy(probabilities, labels)),
        "melanoma_auc": rounded(area_under_curve(probabilities[:, MELANOMA], labels == MELANOMA)),
        "ece": rounded(calibration_error(probabilities, labels)),
        "log_loss": rounded(log_loss(probabilities, labels)),
    }


def source_figures(known: Floats, rows: list[LabelledImage]) -> dict[str, dict[str, float]]:
    """A classifier alone, N×8 and no UNK: all of the archive, HAM10000 in it, the rest of it, and bcn84."""
    labels, source, ham = labels_of(rows), np.array([row.source for row in rows]), of_ham10000(rows)
    malignant = [i for i, d in enumerate(TRAINED) if d in MALIGNANT]
    is_malignant, p_malignant = np.isin(labels, malignant), known[:, malignant].sum(1)
    groups = {
        "archive": source == ARCHIVE,
        "HAM10000": ham,
        "archive without HAM10000": (source == ARCHIVE) & ~ham,
        BCN84: source == BCN84,
    }
    return {
        name: {
            **accuracy_figures(known[picked], labels[picked]),
            "malignant_auc": rounded(area_under_curve(p_malignant[picked], is_malignant[picked])),
        }
        for name, picked in groups.items()
        if picked.any()
    }


def diagnosis_figures(predictions: Predictions) -> dict[str, Any]:
    """Images, recall, precision (nine classes), one-vs-rest AUC (eight) and confusion row of every diagnosis.

    A row has nine counts, by the first answer; recall and precision are NaN where there is nothing to divide by.
    """
    labels, eight = predictions.labels, predictions.eight
    answers = predictions.nine.argmax(1)
    counts = metrics.confusion_matrix(labels, answers, labels=range(len(Diagnosis)))[:CLASSES]
    with np.errstate(invalid="ignore"):
        recall, precision = (counts.diagonal() / counts.sum(axis)[:CLASSES] for axis in (1, 0))
    return {
        "images_a_class": by_diagnosis(counts.sum(1), int),
        "recall": by_diagnosis(recall),
        "precision": by_diagnosis(precision),
        "auc": by_diagnosis(area_under_curve(eight[:, i], labels == i) for i in range(CLASSES)),
        "confusion": by_diagnosis(counts, np.ndarray.tolist),
    }


def by_diagnosis(values: Iterable[Any], told: Callable[[Any], Any] = rounded) -> dict[str, Any]:
    """One value a trained diagnosis, as it is `told`, by its code."""
    return {d.value: told(value) for d, value in zip(TRAINED, values, strict=True)}


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


def lesion_figures(predictions: Predictions) -> dict[str, dict[str, Any]]:
    """`accuracy_figures`, recall and precision by lesion; instead of images lesions are counted."""
    lesions = lesion_predictions(predictions)
    figures, classes = accuracy_figures(lesions.nine, lesions.labels), diagnosis_figures(lesions)
    return {
        "by_lesion": {"lesions": figures.pop("images"), **figures},
        "diagnosis_by_lesion": {
            "lesions_a_class": classes["images_a_class"],
            "recall": classes["recall"],
            "precision": classes["precision"],
        },
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
    scores, positive = lesion_scores(predictions.eight, labels, predictions.lesions, (Diagnosis.MEL,))
    false_alarms, sensitivity, thresholds = metrics.roc_curve(positive, scores, drop_intermediate=False)
    # One threshold for every distinct score of a melanoma.
    rises = np.flatnonzero(np.diff(sensitivity) > 0.0) + 1
    thresholds, sensitivity, specificity = thresholds[rises], sensitivity[rises], 1.0 - false_alarms[rises]
    readings = []
    for wanted in READINGS:
        at = int(np.flatnonzero(sensitivity >= wanted - 1e-12)[0])
        found = measure_threshold(scores, positive, float(thresholds[at]))
        readings.append(
            {
                "threshold": rounded(found.threshold, 6),
                "hits": found.positives - found.misses,
                "positives": found.positives,
                "sensitivity": rounded(found.sensitivity),
                "lower_bound": rounded(found.lower_bound),
                "negatives": found.negatives,
                "specificity": rounded(found.specificity),
            }
        )
    return {
        "auc": rounded(area_under_curve(scores, positive)),
        "readings": readings,
        "threshold": [rounded(t, 5) for t in thresholds],
        "sensitivity": [rounded(s) for s in sensitivity],
        "specificity": [rounded(s) for s in specificity],
    }


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
            "told": rounded(told[inside].mean()),
            "found": rounded(came_true[inside].mean()),
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
    # p(AKIEC) = p(AK) + p(SCC)
    seven = ham.eight @ np.eye(len(SEVEN))[_SEVEN_OF_EIGHT]
    return {
        "isic2019_eight": scored(predictions, predictions.eight, predictions.labels, tuple(TRAINED)),
        "isic2018_seven_ham10000": scored(ham, seven, _SEVEN_OF_EIGHT[ham.labels], SEVEN),
    }


def scored(predictions: Predictions, known: Floats, labels: Labels, names: Sequence[str]) -> dict[str, Any]:
    """Figures of an N×C table of probabilities of these predictions as the ISIC challenges count them.

    A refused image's row is all zeros: the challenges' own code calls such a tie undecided, and so
    wrong, and in every AUC it ranks last. That code gave the same figures for derm1 to derm9.
    """
    refused = predictions.nine.argmax(1) == UNKNOWN
    table = np.where(refused[:, None], 0.0, known)
    # UNK as one more class: argmax of a row of zeros must not be the first diagnosis.
    answers = np.concatenate([table, refused[:, None].astype(np.float64)], axis=1)
    auc = {str(name): area_under_curve(table[:, c], labels == c) for c, name in enumerate(names)}
    return {
        "images": len(labels),
        "refused": int(refused.sum()),
        "top1": rounded(top_k_accuracy(answers, labels, 1)),
        "balanced_accuracy": rounded(balanced_accuracy(answers, labels)),
        "auc": {name: round(value, 4) for name, value in auc.items()},
        "mean_auc": rounded(np.nanmean(list(auc.values()))),
    }


def set_figures(
    predictions: Predictions,
    sets: NDArray[np.bool_],
    coverage: float,
    calibration_images: Mapping[str, int],
) -> dict[str, Any]:
    """Coverage of every class beside the range that chance allows, and the sizes of the sets.

    `sets`: N×8, which diagnoses are in each. `calibration_images` are those that each class's threshold was found on.
    """
    labels = predictions.labels
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
        "coverage": rounded(sets[np.arange(len(labels)), labels].mean()),
        "classes": classes,
        "mean_size": round(float(size.mean()), 3),
        "share_of_one": rounded((size == 1).mean()),
        "share_empty": rounded((size == 0).mean()),
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
    with np.errstate(invalid="ignore"):  # a diagnosis that was not drawn has no share
        recall, precision = (
            [weights @ (hit & (of == c)) / (weights @ (of == c)) for c in range(CLASSES)]
            for of in (labels, answer)
        )
    eight = predictions.eight
    return {
        "resamples": resamples,
        "top1": interval(weights @ hit / total),
        "top3": interval(weights @ in_three / total),
        "balanced_accuracy": interval(np.nanmean(recall, axis=0)),
        "melanoma_auc": interval(weighted_auc(nine[:, MELANOMA], labels == MELANOMA, weights)),
        "ece": interval(weighted_calibration_error(nine, labels, weights)),
        "recall": by_diagnosis(recall, interval),
        "precision": by_diagnosis(precision, interval),
        "auc": by_diagnosis(
            (weighted_auc(eight[:, c], labels == c, weights) for c in range(CLASSES)), interval
        ),
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
    with np.errstate(invalid="ignore"):
        return np.asarray((up * below).sum(1) / (up.sum(1) * down.sum(1)))


def interval(values: Floats) -> Interval:
    """The middle 95 % of the resampled values; NaN when there is none."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, (0.025, 0.975))
    return rounded(low), rounded(high)
