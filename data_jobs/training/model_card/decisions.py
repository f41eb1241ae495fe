"""What is decided from the probabilities: operating points, prediction sets, UNK, similar cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_jobs.training.model_card.pictures import MELANOMA_NAME
from data_jobs.training.model_card.table import share, table
from model_store.manifest import Manifest
from serve_app.domain.diagnosis import TRAINED


def points_section(manifest: Manifest, evaluated: Mapping[str, Any]) -> str:
    """The operating points as fitted and on fold 0, and the melanoma curve."""
    rows = []
    for name, point in manifest.operating_points.items():
        test = evaluated["operating_points"][name]
        rows.append(
            (
                name,
                f"{point.threshold:.6f}",
                f"{point.misses} of {point.positives}",
                point.specificity,
                f"{test['misses']} of {test['positives']}",
                f"{test['sensitivity']:.4f} (≥ {test['lower_bound']:.4f})",
                f"{test['specificity']:.4f}",
            )
        )
    head = (
        "point",
        "threshold",
        "missed (fitted)",
        "specificity (fitted)",
        "missed (fold 0)",
        "sensitivity (fold 0)",
        "specificity (fold 0)",
    )
    curve = evaluated["melanoma_curve"]
    readings = [
        (
            f"{r['hits']} of {r['positives']}",
            f"{r['sensitivity']:.4f} (≥ {r['lower_bound']:.4f})",
            f"{r['specificity']:.4f}",
            f"{r['threshold']:.5f}",
        )
        for r in curve["readings"]
    ]
    return f"""## Operating points

Chosen on the calibration fold as the largest threshold whose sensitivity has its one-sided 95 % Clopper-Pearson bound
at 0.95 or above; by lesion, a malignant lesion counting by its lowest image and a benign one by its highest. `malignant` is
p(MEL) + p(BCC) + p(SCC) + p(AK). In brackets the lower bound on fold 0.

{table(head, rows)}
Melanoma on fold 0 by lesion, AUC {curve["auc"]}. What other thresholds would have given there (read off, none is used):

{table(("found", "sensitivity", "specificity", "p(MEL) of at least"), readings)}
![Melanoma sensitivity and specificity]({MELANOMA_NAME})
"""


def sets_section(evaluated: Mapping[str, Any]) -> str:
    """Coverage of the prediction sets beside what chance allows."""
    sets = evaluated["sets"]
    rows = []
    for d in TRAINED:
        c = sets["classes"][d]
        rows.append(
            (
                d.display_name,
                c["calibration_images"],
                f"{c['covered']} of {c['images']}",
                share(c["coverage"]),
                f"{c['range'][0]} to {c['range'][1]}",
                "yes" if c["within_range"] else "**no**",
            )
        )
    head = ("diagnosis", "calibration images", "covered", "coverage", "expected", "as expected")
    return f"""## Prediction sets

Class-conditional split conformal sets with a promise of {100 * sets["nominal_coverage"]:g} % for every diagnosis, thresholds from the calibration
fold. `expected` is where 95 % of all counts fall when the promise holds (beta-binomial; images taken as independent).

{table(head, rows)}
Over all: coverage {sets["coverage"]}, mean size {sets["mean_size"]}, one diagnosis in {sets["share_of_one"]:.1%} of images, empty in
{sets["share_empty"]:.1%}.
"""


def unknown_section(
    manifest: Manifest, evaluated: Mapping[str, Any], compared: Mapping[str, Any] | None
) -> str:
    """p(UNK) on the fold and on what is no lesion; how the score was chosen, where that was measured."""
    head = ("", "images", "AUROC", "median p(UNK)", "p(UNK) > 0.5")
    names = ("images", "auroc", "median_p_unk", "share_p_unk_over_half")
    far = [(kind, *(f[n] for n in names)) for kind, f in evaluated["outliers"].items()]
    near = [(kind, *(f[n] for n in names)) for kind, f in evaluated["skin_like"].items()]
    return f"""## Unknown

p(UNK) comes from a distance of the bottleneck ({manifest.ood.method}),
not from a trained class. On fold 0 its median is {evaluated["median_p_unk"]} and UNK is the first answer in {evaluated["unk_share"]:.2%} of images. Outliers of the test part (no
source photograph shared with the fit), against fold 0:

{table(head, far)}
Made from lesions of fold 0 (inverting was fitted on, with other lesions; the rest never):

{table(head, near)}
{_compared(compared)}"""


def _compared(compared: Mapping[str, Any] | None) -> str:
    if compared is None:
        return ""
    kinds = list(next(iter(compared["auroc"].values())))
    rows = [(method, *(found[kind] for kind in kinds)) for method, found in compared["auroc"].items()]
    return f"""AUROC of other scores on the same features ({compared["training_images"]} training images, {compared["known_images"]} of the calibration fold,
outliers of the test part; `python -m data_jobs.training.unknown_methods`):

{table(("score", *kinds), rows)}"""


def retrieval_section(manifest: Manifest, calibrated: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    """What the similar cases are worth, and how the space was chosen."""
    names = ("precision_at_10", "balanced_precision_at_10")
    rows = [(name, *(f[n] for n in names)) for name, f in calibrated["spaces"].items()]
    found = evaluated["retrieval"]
    low, high = found["vote_minus_softmax_interval"]
    return f"""## Similar cases

Space `{manifest.live_space.embedding_space}`, {found["references"]} references of folds 1 to 4, one a lesion. Queries of
fold 0: precision@10 {found["precision_at_10"]} (mean over diagnoses {found["balanced_precision_at_10"]}). Melanoma AUC on the same images: a
16-neighbour vote {found["vote_16_melanoma_auc"]:.4f}, the softmax (without UNK) {found["softmax_melanoma_auc"]:.4f}; the vote's minus the softmax's is
{found["vote_minus_softmax"]:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (paired bootstrap of lesions). References that the network was trained on
lie closer to their class than new images do. How the space was chosen (calibration fold against training folds, other lesions only):

{table(("space", *names), rows)}"""
