"""Candidate beside live on the same confirmed cases: what changes, for whom, and whether by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_jobs.promotion.answers import CaseAnswers
from data_jobs.promotion.figures import Figures, Flags, measure, subgroups
from data_jobs.promotion.paired import PairedCounts, compare_pairs
from data_jobs.training.dataset import LabelledImage, labels_of
from data_jobs.training.probabilities import Labels, area_under_curve
from model_store.manifest import OperatingPoint
from model_store.registry import StoredModel
from serve_app.domain.assessment import Urgency
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import DermError, ModelContractError

#: Refused, with no referral of its own, counts as less than routine.
_URGENCIES = ("", *(urgency.value for urgency in Urgency))
_ALL = tuple(Diagnosis)
_MELANOMA = TRAINED.index(Diagnosis.MEL)


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

    @property
    def top1_loss(self) -> float:
        """Live minus candidate."""
        return self.live_top1 - self.candidate_top1


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
    melanoma = labels == _MELANOMA
    if melanoma.all() or not melanoma.any():
        raise DermError("The cases must hold melanomas and other lesions; nothing can be compared on these.")
    live_figures, live_flags = measure(live.nine, labels, rows, melanoma_point(live_model))
    figures, flags = measure(candidate.nine, labels, rows, melanoma_point(candidate_model))
    changed = tuple(_changed(live, candidate, rows))
    malignant = [case for case in changed if Diagnosis(case.truth) in MALIGNANT]
    return Comparison(
        live=live_figures,
        candidate=figures,
        paired=_paired(live, candidate, labels, live_flags, flags),
        subgroups=_subgroups(live, candidate, labels, rows),
        changed=changed,
        malignant_images=sum(row.diagnosis in MALIGNANT for row in rows),
        malignant_downgrades=sum(case.downgraded for case in malignant),
        malignant_upgrades=sum(case.upgraded for case in malignant),
    )


def melanoma_point(model: StoredModel) -> OperatingPoint:
    """Give the operating point that melanomas are flagged at."""
    try:
        return model.manifest.operating_points["melanoma"]
    except KeyError:
        raise ModelContractError(
            f"{model.manifest.model_id} has no operating point `melanoma`: calibrate it anew."
        ) from None


def _paired(
    live: CaseAnswers, candidate: CaseAnswers, labels: Labels, live_flags: Flags, flags: Flags
) -> dict[str, PairedCounts]:
    positive = flags.positive
    return {
        "first answer right": compare_pairs(
            live.nine.argmax(1) == labels, candidate.nine.argmax(1) == labels
        ),
        "melanoma flagged": compare_pairs(live_flags.flagged[positive], flags.flagged[positive]),
        "other lesion not flagged": compare_pairs(~live_flags.flagged[~positive], ~flags.flagged[~positive]),
    }


def _subgroups(
    live: CaseAnswers, candidate: CaseAnswers, labels: Labels, rows: Sequence[LabelledImage]
) -> dict[str, Subgroup]:
    right = [answers.nine.argmax(1) == labels for answers in (live, candidate)]
    melanoma = labels == _MELANOMA

    def auc(answers: CaseAnswers, picked: NDArray[np.bool_]) -> float:
        return area_under_curve(answers.nine[picked, _MELANOMA], melanoma[picked])

    return {
        name: Subgroup(
            images=int(picked.sum()),
            live_top1=float(right[0][picked].mean()),
            candidate_top1=float(right[1][picked].mean()),
            live_melanoma_auc=auc(live, picked),
            candidate_melanoma_auc=auc(candidate, picked),
        )
        for name, picked in subgroups(rows).items()
    }


def _changed(live: CaseAnswers, candidate: CaseAnswers, rows: Sequence[LabelledImage]) -> list[ChangedCase]:
    cases = [
        ChangedCase(row.isic_id, row.diagnosis.value, _view(live, i), _view(candidate, i))
        for i, row in enumerate(rows)
    ]
    return [case for case in cases if case.changes]


def _view(answers: CaseAnswers, index: int) -> CaseView:
    return CaseView(
        top1=_ALL[int(answers.nine[index].argmax())].value,
        prediction_set=tuple(d.value for d, held in zip(TRAINED, answers.sets[index], strict=True) if held),
        outcome=str(answers.outcome[index]),
        urgency=str(answers.urgency[index]),
    )
