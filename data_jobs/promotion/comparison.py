"""Candidate beside live on the same confirmed cases: how accurate each is, what changes, for whom, and whether by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from data_jobs.promotion.answers import CaseAnswers
from data_jobs.training.dataset import LabelledImage, labels_of
from data_jobs.training.evaluation.figures import age_band, split
from data_jobs.training.evaluation.predictions import MELANOMA, known_eight
from data_jobs.training.operating_points import lesion_scores, measure_threshold
from data_jobs.training.probabilities import (
    Floats,
    Labels,
    area_under_curve,
    balanced_accuracy,
    calibration_error,
    top_k_accuracy,
)
from model_store.registry import StoredModel
from serve_app.domain.assessment import Urgency
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import DermError, ModelContractError

#: Refused, with no referral of its own, counts as less than routine.
_URGENCIES = ("", *(urgency.value for urgency in Urgency))


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """Cases that only the live model, or only the candidate, gets right; p of McNemar's exact test."""

    cases: int
    lost: int
    gained: int
    p_value: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Accuracy with UNK as a wrong answer; sensitivity and specificity of the point `melanoma`, by lesion."""

    images: int
    top1: float
    top3: float
    balanced_accuracy: float
    melanoma_auc: float
    ece: float
    melanoma_lesions: int
    melanoma_misses: int
    melanoma_sensitivity: float
    melanoma_sensitivity_bound: float
    melanoma_specificity: float


@dataclass(frozen=True, slots=True)
class CaseView:
    """What a clinician would see of one model's answer."""

    top1: str
    prediction_set: tuple[str, ...]
    outcome: str
    urgency: str


@dataclass(frozen=True, slots=True)
class ChangedCase:
    """A confirmed case whose first diagnosis, set or urgency is another under the candidate."""

    isic_id: str
    truth: str
    live: CaseView
    candidate: CaseView

    @property
    def changes(self) -> tuple[str, ...]:
        """What of it changed."""
        kinds = ("top1", "prediction_set", "urgency")
        return tuple(kind for kind in kinds if getattr(self.live, kind) != getattr(self.candidate, kind))

    @property
    def downgraded(self) -> bool:
        """Whether the referral became less urgent."""
        return _URGENCIES.index(self.candidate.urgency) < _URGENCIES.index(self.live.urgency)

    @property
    def upgraded(self) -> bool:
        """Whether the referral became more urgent."""
        return _URGENCIES.index(self.candidate.urgency) > _URGENCIES.index(self.live.urgency)


@dataclass(frozen=True, slots=True)
class Subgroup:
    """One group of images under both models; AUC is NaN without melanomas and others."""

    images: int
    live_top1: float
    candidate_top1: float
    live_melanoma_auc: float
    candidate_melanoma_auc: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that is told of a candidate beside the live model.

    paired: first answer right, melanoma lesions flagged, other lesions not flagged.
    malignant_downgrades, malignant_upgrades: malignant images whose referral becomes less, or more urgent, of
    `malignant_images`.
    """

    live: Figures
    candidate: Figures
    paired: dict[str, PairedCounts]
    subgroups: dict[str, Subgroup]
    changed: tuple[ChangedCase, ...]
    malignant_images: int
    malignant_downgrades: int
    malignant_upgrades: int


def compare(
    live: CaseAnswers,
    candidate: CaseAnswers,
    rows: Sequence[LabelledImage],
    *,
    live_model: StoredModel,
    candidate_model: StoredModel,
) -> Comparison:
    """Compare both models' answers to the same rows.

    Raises DermError when the rows hold no melanoma or nothing else, ModelContractError when a
    model has no operating point for melanoma.
    """
    labels = labels_of(list(rows))
    melanoma = labels == MELANOMA
    if melanoma.all() or not melanoma.any():
        raise DermError("The cases must hold melanomas and other lesions; nothing can be compared on these.")
    live_figures, was_flagged, positive = _measure(live.nine, labels, rows, live_model)
    figures, is_flagged, _ = _measure(candidate.nine, labels, rows, candidate_model)
    was_right, is_right = live.nine.argmax(1) == labels, candidate.nine.argmax(1) == labels
    changed = tuple(_changed(live, candidate, rows))
    malignant = [case for case in changed if Diagnosis(case.truth) in MALIGNANT]
    return Comparison(
        live=live_figures,
        candidate=figures,
        paired={
            "first answer right": compare_pairs(was_right, is_right),
            "melanoma flagged": compare_pairs(was_flagged[positive], is_flagged[positive]),
            "other lesion not flagged": compare_pairs(~was_flagged[~positive], ~is_flagged[~positive]),
        },
        subgroups={
            name: Subgroup(
                images=int(picked.sum()),
                live_top1=float(was_right[picked].mean()),
                candidate_top1=float(is_right[picked].mean()),
                live_melanoma_auc=area_under_curve(live.nine[picked, MELANOMA], melanoma[picked]),
                candidate_melanoma_auc=area_under_curve(candidate.nine[picked, MELANOMA], melanoma[picked]),
            )
            for name, picked in _split(rows).items()
        },
        changed=changed,
        malignant_images=sum(row.diagnosis in MALIGNANT for row in rows),
        malignant_downgrades=sum(case.downgraded for case in malignant),
        malignant_upgrades=sum(case.upgraded for case in malignant),
    )


def compare_pairs(live: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> PairedCounts:
    """Count the discordant of N pairs of right (true) and wrong answers.

    The p-value is McNemar's exact, two-sided: twice the tail of Binomial(lost + gained, 1/2), at
    most 1 (McNemar, Psychometrika 1947; exact form in Fagerland et al., BMC Med Res Methodol 2013).
    """
    lost, gained = int((live & ~candidate).sum()), int((~live & candidate).sum())
    p_value = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return PairedCounts(len(live), lost, gained, p_value)


def _measure(
    nine: Floats, labels: Labels, rows: Sequence[LabelledImage], model: StoredModel
) -> tuple[Figures, NDArray[np.bool_], NDArray[np.bool_]]:
    """Figures of N×9 probabilities; which lesions the model's melanoma point flags, and which are melanomas.

    The lesions come in the same order for every model.
    """
    point = model.manifest.operating_points.get("melanoma")
    if point is None:
        raise ModelContractError(
            f"{model.manifest.model_id} has no operating point `melanoma`: calibrate it anew."
        )
    lesions = [row.lesion for row in rows]
    scores, positives = lesion_scores(known_eight(nine), labels, lesions, point.diagnoses)
    found = measure_threshold(scores, positives, point.threshold)
    figures = Figures(
        images=len(labels),
        top1=top_k_accuracy(nine, labels, 1),
        top3=top_k_accuracy(nine, labels, 3),
        balanced_accuracy=balanced_accuracy(nine, labels),
        melanoma_auc=area_under_curve(nine[:, MELANOMA], labels == MELANOMA),
        ece=calibration_error(nine, labels),
        melanoma_lesions=found.positives,
        melanoma_misses=found.misses,
        melanoma_sensitivity=found.sensitivity,
        melanoma_sensitivity_bound=found.lower_bound,
        melanoma_specificity=found.specificity,
    )
    return figures, scores >= point.threshold, positives


def _split(rows: Sequence[LabelledImage]) -> dict[str, NDArray[np.bool_]]:
    """Which rows belong to which sex, age band, body site and source."""
    return split(
        {
            "sex": [row.sex or "unknown" for row in rows],
            "age": [age_band(row.age_approx) for row in rows],
            "site": [row.anatom_site_general or "unknown" for row in rows],
            "source": ["HAM10000" if row.lesion.startswith("HAM_") else "other" for row in rows],
        }
    )


def _changed(live: CaseAnswers, candidate: CaseAnswers, rows: Sequence[LabelledImage]) -> list[ChangedCase]:
    cases = [
        ChangedCase(row.isic_id, row.diagnosis.value, _view(live, i), _view(candidate, i))
        for i, row in enumerate(rows)
    ]
    return [case for case in cases if case.changes]


def _view(answers: CaseAnswers, index: int) -> CaseView:
    return CaseView(
        top1=tuple(Diagnosis)[int(answers.nine[index].argmax())].value,
        prediction_set=tuple(d.value for d, held in zip(TRAINED, answers.sets[index], strict=True) if held),
        outcome=str(answers.outcome[index]),
        urgency=str(answers.urgency[index]),
    )
