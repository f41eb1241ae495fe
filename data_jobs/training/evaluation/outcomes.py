"""What the service would answer to labelled images: its own code in this process, from the file's bytes to the urgency."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.references.load import ReferenceBundle, read_bundle
from data_jobs.training.dataset import LabelledImage
from data_jobs.training.evaluation.predictions import UNKNOWN, Predictions, classify, tabulate
from data_jobs.training.probabilities import rounded
from data_jobs.training.scan import joined
from deployments.classifier.calibration import Calibrator
from deployments.embedder.embedder import EmbeddingSpace
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import PreparedImage, prepare_image
from deployments.risk.policy import RiskPolicy
from deployments.risk.risk import conclude
from deployments.risk.rules import LEVELS, Findings
from model_store.registry import StoredModel
from model_store.session import InferenceSession, Outputs
from serve_app.domain.assessment import (
    WEIGHED,
    Classification,
    Conclusion,
    Neighbours,
    Outcome,
    RiskLevel,
    SimilarCase,
)
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import DermError, RejectedUpload
from serve_app.domain.patient import AnatomSite, ClinicalContext, Sex

#: Reasons that say: this is not what the model knows.
UNKNOWN_REASONS = frozenset({"not_dermoscopic", "out_of_distribution"})
_BATCH = 32
_SITES = {site.value: site for site in AnatomSite}
_SEXES = {sex.value: sex for sex in Sex}


class ReferenceSearch:
    """Exact cosine search over a bundle; `ReferenceStore.nearest` is its twin in the database."""

    def __init__(self, bundle: ReferenceBundle) -> None:
        self._images, self._embeddings = bundle.images, bundle.embeddings
        lesions = [image.lesion_id or image.isic_id for image in bundle.images]
        # Numbers for lesions: comparing 4,000 strings for every case takes longer than the model.
        self._numbers = {lesion: i for i, lesion in enumerate(dict.fromkeys(lesions))}
        self._lesion = np.array([self._numbers[lesion] for lesion in lesions], dtype=np.int64)
        self._malignant = np.array([image.diagnosis in MALIGNANT for image in bundle.images])

    def nearest(self, embedding: NDArray[np.float32], *, k: int, lesion: str) -> Neighbours:
        """Find the K references most similar to a unit vector (512), one a lesion, none of `lesion`."""
        similarity = self._embeddings @ embedding
        order = np.argsort(-similarity, kind="stable")
        order = order[self._lesion[order] != self._numbers.get(lesion, -1)]
        _, firsts = np.unique(self._lesion[order], return_index=True)
        distinct = order[np.sort(firsts)]
        malignant = self._malignant[distinct]
        similar, nearest_benign, nearest_malignant = (
            [SimilarCase(**asdict(self._images[i]), similarity=float(similarity[i])) for i in found]
            for found in (distinct[:k], distinct[~malignant][:1], distinct[malignant][:1])
        )
        return Neighbours(
            similar=tuple(similar),
            malignant_share=float(malignant[:k].mean()) if similar else None,
            nearest_benign=next(iter(nearest_benign), None),
            nearest_malignant=next(iter(nearest_malignant), None),
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """What the service would answer to N images; `scan` holds what the network gave."""

    scan: Outputs
    classified: list[Classification]
    concluded: list[Conclusion]

    @property
    def nine(self) -> NDArray[np.float64]:
        """N×9 probabilities in the order of Diagnosis."""
        return tabulate(self.classified)[0]

    @property
    def sets(self) -> NDArray[np.bool_]:
        """N×8 membership of the prediction set in the order of TRAINED."""
        return np.array([[d in answer.prediction_set for d in TRAINED] for answer in self.classified])

    @property
    def outcomes(self) -> NDArray[np.str_]:
        """N outcomes."""
        return np.array([conclusion.outcome.value for conclusion in self.concluded])

    @property
    def levels(self) -> NDArray[np.str_]:
        """N risk levels, empty where the image was refused."""
        return np.array([c.risk.level.value if c.risk else "" for c in self.concluded])

    @property
    def urgencies(self) -> NDArray[np.str_]:
        """N urgencies, empty where the image was refused."""
        return np.array([c.risk.urgency.value if c.risk else "" for c in self.concluded])

    def __getitem__(self, picked: NDArray[np.int64]) -> Answers:
        """The answers at these positions."""
        others = (self.classified, self.concluded)
        return Answers(self.scan.part(picked), *([found[i] for i in picked] for found in others))

    def predictions(self, rows: list[LabelledImage]) -> Predictions:
        """As the table that figures of probabilities are read from."""
        return Predictions(rows, *tabulate(self.classified))


class LocalService:
    """One model and one policy from the file's bytes to the conclusion, among the references that the model ships.

    What the archive knows of a patient (age, sex, site) is the context, as a PMS would send it; nothing is known of
    an earlier visit.
    """

    def __init__(self, model: StoredModel, policy: RiskPolicy, *, threads: int) -> None:
        live = model.manifest.live_space
        self.run = InferenceSession(model, threads=threads).run
        self.calibrator = Calibrator.from_model(model)
        self.geometry = InputGeometry.from_manifest(model.manifest.input)
        self._space = EmbeddingSpace.from_model(model, live)
        self._search = ReferenceSearch(read_bundle(model, live))
        self._points = {name: point.threshold for name, point in model.manifest.operating_points.items()}
        self._policy = policy

    def prepare(self, rows: Sequence[LabelledImage], archive: Path) -> list[PreparedImage]:
        """Decode and measure each row's file, on several cores. Raises DermError for one that no upload could be."""

        def read(row: LabelledImage) -> PreparedImage:
            path = archive / row.path
            try:
                return prepare_image(path.read_bytes(), self.geometry, ARCHIVE_LIMITS)
            except RejectedUpload as error:
                raise DermError(f"{path}: {error}") from error

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(read, rows))

    def answer(
        self,
        rows: Sequence[LabelledImage],
        images: Sequence[PreparedImage],
    ) -> Answers:
        """Answer N prepared images of these rows.

        Raises StageFailed when the model's output is not finite, ModelContractError when it lacks what the policy
        asks for.
        """
        scan = joined(
            self.run(np.stack([image.pixels for image in images[start : start + _BATCH]]))
            for start in range(0, len(images), _BATCH)
        )
        classified = classify(self.calibrator, scan)
        vectors = self._space.embed(scan.bottleneck)
        concluded = [self._conclude(*each) for each in zip(rows, images, classified, vectors, strict=True)]
        return Answers(scan, classified, concluded)

    def _conclude(
        self,
        row: LabelledImage,
        image: PreparedImage,
        classification: Classification,
        vector: NDArray[np.float32],
    ) -> Conclusion:
        context = ClinicalContext(
            anatom_site_general=_SITES.get(row.anatom_site_general or ""),
            age_approx=row.age_approx,
            sex=_SEXES.get(row.sex or ""),
        )
        neighbours = self._search.nearest(vector, k=WEIGHED, lesion=row.lesion)
        findings = Findings(
            image.quality, image.width, image.height, classification, neighbours, context, change=None
        )
        return conclude(findings, self._policy, self._points)


def outcome_figures(rows: Sequence[LabelledImage], answers: Answers, policy: RiskPolicy) -> dict[str, Any]:
    """What a clinician is told of these images: levels by diagnosis, doubts by cause, shares of all images.

    An image counts under every cause that it has. `for_unknown`: refused or in review for UNK, whatever else for;
    `p_unk_over_limit`: p(UNK) that would be, also where a blurred image was refused before that was asked.
    `low_decided` is the worst that can happen to a malignant lesion: nobody is asked to look.
    """
    reasons = [{reason.code for reason in conclusion.reasons} for conclusion in answers.concluded]
    causes = Counter(code for found in reasons for code in found)
    outcomes = answers.outcomes
    return {
        "policy_version": policy.version,
        "by_image": _levels([(row.diagnosis, [i]) for i, row in enumerate(rows)], answers),
        "by_lesion": _levels(_images_of_lesions(rows), answers),
        "review": rounded((outcomes == Outcome.REVIEW).mean()),
        "refused": rounded((outcomes == Outcome.REFUSED).mean()),
        "for_unknown": rounded(np.mean([bool(found & UNKNOWN_REASONS) for found in reasons])),
        "p_unk_over_limit": rounded((answers.nine[:, UNKNOWN] >= policy.review.max_unknown).mean()),
        "causes": {code: rounded(count / len(rows)) for code, count in causes.most_common()},
        "mean_set_size": rounded(answers.sets.sum(1).mean(), 3),
    }


def _images_of_lesions(rows: Sequence[LabelledImage]) -> list[tuple[Diagnosis, list[int]]]:
    """Every lesion's diagnosis and images; one with two diagnoses counts once for each."""
    found: defaultdict[tuple[Diagnosis, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        found[row.diagnosis, row.lesion].append(i)
    return [(diagnosis, images) for (diagnosis, _), images in found.items()]


def _levels(cases: Sequence[tuple[Diagnosis, list[int]]], answers: Answers) -> dict[str, dict[str, int]]:
    """Cases by diagnosis and level. As for the operating points the less favourable image counts.

    A malignant case has its lowest level, a benign one its highest. `low_decided`: any image of a malignant case, every
    one of a benign case; `refused`: any.
    """
    levels, outcomes = answers.levels, answers.outcomes
    counts = {d: dict.fromkeys(("cases", *LEVELS, "low_decided", "refused"), 0) for d in TRAINED}
    for diagnosis, images in cases:
        found = counts[diagnosis]
        found["cases"] += 1
        if told := [LEVELS.index(RiskLevel(levels[i])) for i in images if levels[i]]:
            found[LEVELS[min(told) if diagnosis in MALIGNANT else max(told)]] += 1
        low = (levels[images] == RiskLevel.LOW) & (outcomes[images] == Outcome.DECIDED)
        found["low_decided"] += int(low.any() if diagnosis in MALIGNANT else low.all())
        found["refused"] += int((outcomes[images] == Outcome.REFUSED).any())
    return {d.value: {str(name): n for name, n in found.items()} for d, found in counts.items()}
