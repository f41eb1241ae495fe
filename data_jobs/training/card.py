"""The model card: every number in it is read from the JSON files that the jobs measured.

`python -m data_jobs.training.card --model M` writes it anew and seals the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
import json
from pathlib import Path
from typing import Any

from data_jobs.training.manifest_file import seal
from model_store.manifest import Manifest, read_manifest
from serve_app.domain.diagnosis import TRAINED, Diagnosis

#: The floors of the product requirements: name, floor, and where the figure is found.
FLOORS = (("top-1 accuracy", 0.85), ("top-3 accuracy", 0.95), ("melanoma sensitivity", 0.95))


def write_card(folder: Path) -> None:
    """Write `MODEL_CARD.md` from manifest.toml, export.json, calibration.json and evaluation.json."""
    manifest = read_manifest(folder)
    exported, calibrated, evaluated = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("export", "calibration", "evaluation")
    )
    parts = [
        _head(manifest, exported),
        _floors(evaluated),
        _accuracy(evaluated),
        _classes(evaluated),
        _points(manifest, evaluated),
        _unknown(calibrated, evaluated),
        _retrieval(manifest, calibrated, evaluated),
        _robustness(exported, evaluated),
        _limits(calibrated),
    ]
    (folder / "MODEL_CARD.md").write_text("\n".join(parts), encoding="utf-8")


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _head(manifest: Manifest, exported: Mapping[str, Any]) -> str:
    side = manifest.input.input_size[1]
    size = manifest.files[manifest.onnx].bytes / 1e6
    return f"""# {manifest.model_id}

A {manifest.architecture} trunk with a 512-wide bottleneck (the embedding) and eight logits, for
**dermoscopic** images. Input {side}×{side}, squashed from any aspect; {size:.1f} MB of ONNX, float32.

Intended use: decision support for clinicians who have seen the patient. It ranks the eight
ISIC 2019 diagnoses, finds similar confirmed cases and says when it does not know. It is never a
diagnosis, and nothing it says may lower the urgency that a rule or a clinician demands.

Trained on {manifest.training_data}. The images are for the most
part CC BY-NC 4.0: **the weights are for non-commercial use** until trained on data with another licence.
Folds are grouped by lesion. Calibrated on {manifest.calibration.fitted_on}. Fold 0 was used for nothing but the
figures below. ONNX against torch: largest logit difference {exported["parity"]["max_abs_logit"]:.1e} over
{exported["parity"]["images"]} images.
"""


def _floors(evaluated: Mapping[str, Any]) -> str:
    figures, point = evaluated["with_unk"], evaluated["operating_points"]["melanoma"]
    measured = (figures["top1"], figures["top3"], point["sensitivity"])
    rows = [
        (name, f"> {floor}", f"{value:.4f}", "met" if value > floor else "**not met**")
        for (name, floor), value in zip(FLOORS, measured, strict=True)
    ]
    if point["sensitivity"] > FLOORS[2][1] > point["lower_bound"]:
        rows[2] = (*rows[2][:3], "met as measured, **not proven**: its lower bound is under the floor")
    return f"""## Against the required floors, on fold 0

{_table(("figure", "floor", "measured", ""), rows)}
Melanoma sensitivity is that of the operating point `melanoma` by lesion ({point["misses"]} of
{point["positives"]} missed, one-sided 95 % lower bound {point["lower_bound"]:.4f}), at a specificity of
{point["specificity"]:.4f}. It says nothing of how often melanoma is the first answer: see recall.
"""


def _accuracy(evaluated: Mapping[str, Any]) -> str:
    names = ("images", "top1", "top3", "balanced_accuracy", "melanoma_auc", "ece", "log_loss")
    kinds = {
        "nine classes, UNK counts as wrong": "with_unk",
        "eight classes, UNK left out": "without_unk",
        "nine, HAM10000 images only": "ham10000",
    }
    rows = [(kind, *(evaluated[key][name] for name in names)) for kind, key in kinds.items()]
    intervals = ", ".join(f"{name} {low} to {high}" for name, (low, high) in evaluated["intervals"].items())
    return f"""## Accuracy on fold 0

{_table(("", *names), rows)}
95 % intervals (bootstrap over lesions): {intervals}.
"""


def _classes(evaluated: Mapping[str, Any]) -> str:
    rows = [
        (
            d.display_name,
            evaluated["images_a_class"][d],
            evaluated["recall"][d],
            evaluated["auc"][d],
            evaluated["sets"]["coverage_by_class"][d],
            *evaluated["confusion"][d],
        )
        for d in TRAINED
    ]
    sets = evaluated["sets"]
    head = ("diagnosis", "images", "recall", "AUC", "set coverage", *(f"→ {d}" for d in Diagnosis))
    return f"""## By diagnosis

{_table(head, rows)}
The right-hand columns are the confusion matrix. Prediction sets (class-conditional, nominal coverage 0.95): overall coverage
{sets["coverage"]}, mean size {sets["mean_size"]}, one diagnosis in {sets["share_of_one"]:.1%} of images, empty in
{sets["share_empty"]:.1%}.
"""


def _points(manifest: Manifest, evaluated: Mapping[str, Any]) -> str:
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
    return f"""## Operating points

Chosen on the calibration fold as the largest threshold whose sensitivity has its one-sided 95 % Clopper-Pearson bound
at 0.95 or above; by lesion, a malignant lesion counting by its lowest image and a benign one by its highest. `malignant` is
p(MEL) + p(BCC) + p(SCC) + p(AK). In brackets the lower bound on fold 0.

{_table(head, rows)}"""


def _unknown(calibrated: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    head = ("", "images", "AUROC", "median p(UNK)", "p(UNK) > 0.5")
    names = ("images", "auroc", "median_p_unk", "share_p_unk_over_half")
    far = [(kind, *(f[n] for n in names)) for kind, f in evaluated["outliers"].items()]
    near = [(kind, *(f[n] for n in names)) for kind, f in calibrated["skin_like"].items()]
    return f"""## Unknown

p(UNK) comes from a squared distance of the bottleneck (to the classes, and along one direction fitted to outliers), not from
a trained class. On fold 0 its median is
{evaluated["median_p_unk"]} and UNK is the first answer in {evaluated["unk_share"]:.2%} of images. Outliers of the test part (no
source photograph shared with the fit), against fold 0:

{_table(head, far)}
Skin-like, never fitted on, against the calibration fold:

{_table(head, near)}"""


def _retrieval(manifest: Manifest, calibrated: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    names = ("precision_at_10", "balanced_precision_at_10")
    rows = [(name, *(f[n] for n in names)) for name, f in calibrated["spaces"].items()]
    found = evaluated["retrieval"]
    return f"""## Similar cases

Space `{manifest.live_space.embedding_space}`, {found["references"]} references of folds 1 to 4, one a lesion. Queries of
fold 0: precision@10 {found["precision_at_10"]} (mean over diagnoses {found["balanced_precision_at_10"]}), melanoma AUC of a
16-neighbour vote {found["vote_16_melanoma_auc"]}. References that the network was trained on lie closer to their class than new images
do. How the space was chosen (calibration fold against training folds, other lesions only):

{_table(("space", *names), rows)}"""


def _robustness(exported: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    names = ("images", "top1", "balanced_accuracy", "melanoma_auc")
    groups = [(group, *(f[n] for n in names)) for group, f in evaluated["subgroups"].items()]
    sides = [[round(value, 4) for value in side.values()] for side in exported["sides"]]
    soft = evaluated["softened"]
    return f"""## Input size, softening, subgroups

Input side, measured on the calibration fold (the smallest within half a point of the best was taken):

{_table(exported["sides"][0], sides)}
A light blur (0.7 pixels) leaves the first answer unchanged in {soft["top1_agreement"]:.1%} of fold 0 and gives top-1 {soft["top1"]}.

{_table(("fold 0", *names), groups)}"""


def _limits(calibrated: Mapping[str, Any]) -> str:
    few = ", ".join(f"{d} {n}" for d, n in calibrated["images_a_class"].items() if n < 60)
    return f"""## Limits

- **Dermoscopic images only.** Clinical (non-dermoscopic) photographs were not to be had: untested, neither as input nor as UNK.
- **Skin types are not recorded** in the data, which is mostly of light skin: performance on dark skin is unknown.
- Aspect and resolution go with the diagnosis in this archive (AK, SCC and VASC arrive squashed and small). Both were hidden in training by
  squashing every image, random stretch, resampling, blur and JPEG; compare the subgroups above for what is left.
- Few images for calibration of rare diagnoses ({few}): their set thresholds rest on one or two images each, and coverage on new images
  varies widely.
- Ground truth is partly follow-up or consensus, not histology. SCC is mostly in situ (Bowen). Nothing was measured prospectively.
- p(UNK) was fitted to photographs, text, noise and plain colours. What merely resembles a lesion (an inverted image) is mostly not caught by it.
- Thresholds were found on the calibration fold with this very network, so they carry over without refitting; another network needs its own.
"""


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
