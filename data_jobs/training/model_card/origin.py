"""What the model is, what it is for, what it was made from, and what nobody knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_jobs.training.model_card.table import table
from model_store.manifest import Manifest

#: The floors of the product requirements: name, floor, and where the figure is found.
FLOORS = (("top-1 accuracy", 0.85), ("top-3 accuracy", 0.95), ("melanoma sensitivity", 0.95))


def _held_out(evaluated: Mapping[str, Any]) -> str:
    if not evaluated.get("cross_fitted"):
        return f"Fold {evaluated['fold']} was used for nothing but the figures below."
    return (
        f"The network never saw fold {evaluated['fold']}. The figures on it below\nare cross-fitted: temperature, prior, "
        "p(UNK), set thresholds and operating points are fitted\nanew without each fifth of its lesions, and that fifth "
        "is judged by the fit that never saw it\n(`cross_fitting.json`). What ships is fitted on the whole fold."
    )


def head_section(manifest: Manifest, exported: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    """Name, intended use, training data, folds, and parity of the export."""
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
Folds are grouped by lesion. Calibrated on {manifest.calibration.fitted_on}. {_held_out(evaluated)}
ONNX against torch: largest logit difference {exported["parity"]["max_abs_logit"]:.1e} over
{exported["parity"]["images"]} images.
"""


def floors_section(evaluated: Mapping[str, Any]) -> str:
    """The required floors, and whether they are met."""
    figures, point = evaluated["with_unk"], evaluated["operating_points"]["melanoma"]
    measured = (figures["top1"], figures["top3"], point["sensitivity"])
    rows = [
        (name, f"> {floor}", f"{value:.4f}", "met" if value > floor else "**not met**")
        for (name, floor), value in zip(FLOORS, measured, strict=True)
    ]
    if point["sensitivity"] > FLOORS[2][1] > point["lower_bound"]:
        rows[2] = (*rows[2][:3], "met as measured, **not proven**: its lower bound is under the floor")
    return f"""## Against the required floors, on fold 0

{table(("figure", "floor", "measured", ""), rows)}
Melanoma sensitivity is that of the operating point `melanoma` by lesion ({point["misses"]} of
{point["positives"]} missed, one-sided 95 % lower bound {point["lower_bound"]:.4f}), at a specificity of
{point["specificity"]:.4f}. It says nothing of how often melanoma is the first answer: see recall.
"""


def limits_section(calibrated: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    """What was not or could not be tested."""
    few = ", ".join(f"{d} {n}" for d, n in calibrated["images_a_class"].items() if n < 60)
    fold = f"fold {evaluated['fold']}"
    out_of_sample = (
        f"only {fold} is" if evaluated.get("cross_fitted") else f"only the calibration fold and {fold} are"
    )
    return f"""## Limits

- **Dermoscopic images only.** Clinical (non-dermoscopic) photographs were not to be had: untested, neither as input nor as UNK.
- **Skin types are not recorded** in the data, which is mostly of light skin: performance on dark skin is unknown.
- Aspect and resolution go with the diagnosis in this archive (AK, SCC and VASC arrive squashed and small). Both were hidden in training by
  squashing every image, random stretch, resampling, blur and JPEG; compare the subgroups above for what is left.
- One network on one split: {out_of_sample} out of its sample (`predictions.parquet`, `calibration.parquet`). It was not trained
  again for every fold: the intervals tell of other images, not of another training.
- Few images for calibration of rare diagnoses ({few}): their set thresholds rest on one or two images each, and coverage on new images
  varies widely.
- Ground truth is partly follow-up or consensus, not histology. SCC is mostly in situ (Bowen). Nothing was measured prospectively.
- p(UNK) was fitted to photographs, text, noise, drawings and inverted lesions. What merely resembles a lesion may not be caught by it.
- Thresholds were found on the calibration fold with this very network, so they carry over without refitting; another network needs its own.
"""
