"""What a model answers to confirmed cases, by the served code from the file's bytes to the urgency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_jobs.promotion.reference_search import ReferenceSearch
from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.references.load import read_bundle
from data_jobs.training.dataset import LabelledImage
from deployments.classifier.calibration import Calibrator
from deployments.embedder.embedder import EmbeddingSpace
from deployments.preprocess.preprocess import PreparedImage, prepare_image
from deployments.preprocess.resize import InputGeometry
from deployments.risk.policy import RiskPolicy
from deployments.risk.risk import conclude
from model_store.registry import StoredModel
from model_store.session import InferenceSession
from serve_app.domain.assessment import WEIGHED, Classification, Conclusion, Neighbours
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import DermError, RejectedUpload
from serve_app.domain.patient import AnatomSite, ClinicalContext, Sex

BATCH = 16
_SITES = {site.value: site for site in AnatomSite}
_SEXES = {sex.value: sex for sex in Sex}

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class CaseAnswers:
    """One model's answers to N cases.

    nine: N×9 probabilities in the order of `Diagnosis`. sets: N×8 membership of the prediction
    set in the order of `TRAINED`. outcome, level and urgency: N strings; the latter two are
    empty where the image was refused.
    """

    nine: NDArray[np.float64]
    sets: NDArray[np.bool_]
    outcome: NDArray[np.str_]
    level: NDArray[np.str_]
    urgency: NDArray[np.str_]

    def write(self, path: Path) -> None:
        """Write all arrays into an .npz, whole or not at all."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        partial.rename(path)

    @classmethod
    def read(cls, path: Path) -> CaseAnswers:
        """Read what `write` wrote; no pickle is ever loaded."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def answer_cases(
    model: StoredModel,
    rows: Sequence[LabelledImage],
    archive: Path,
    policy: RiskPolicy,
    *,
    threads: int,
    progress: Progress | None = None,
) -> CaseAnswers:
    """Answer every row as the service would, with the model's own references and operating points.

    What the archive knows of a patient (age, sex, site) is the context; nothing is known of an
    earlier visit. Raises StageFailed when the model's output is not finite, ModelContractError
    when it lacks what the policy asks for.
    """
    session = InferenceSession(model, threads=threads)
    calibrator = Calibrator.from_model(model)
    space = EmbeddingSpace.from_model(model, model.manifest.live_space)
    search = ReferenceSearch(read_bundle(model, model.manifest.live_space))
    geometry = InputGeometry.from_manifest(model.manifest.input)
    points = {name: point.threshold for name, point in model.manifest.operating_points.items()}
    answers: list[tuple[Classification, Conclusion]] = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            images = list(pool.map(lambda row: _prepare(row, archive, geometry), part))
            logits, bottleneck = session.run(np.stack([image.pixels for image in images]))
            classified = calibrator.classify(logits, bottleneck)
            vectors = space.embed(bottleneck)
            for row, image, classification, vector in zip(part, images, classified, vectors, strict=True):
                neighbours = search.nearest(vector, k=WEIGHED, lesion=row.lesion)
                conclusion = _conclude(row, image, classification, neighbours, points, policy)
                answers.append((classification, conclusion))
            if progress is not None:
                progress(len(answers))
    return _as_arrays(answers)


def _prepare(row: LabelledImage, archive: Path, geometry: InputGeometry) -> PreparedImage:
    path = archive / "images" / f"{row.isic_id}.jpg"
    try:
        return prepare_image(path.read_bytes(), geometry, ARCHIVE_LIMITS)
    except RejectedUpload as error:
        raise DermError(f"{path}: {error}") from error


def _conclude(
    row: LabelledImage,
    image: PreparedImage,
    classification: Classification,
    neighbours: Neighbours,
    points: dict[str, float],
    policy: RiskPolicy,
) -> Conclusion:
    return conclude(
        quality=image.quality,
        width=image.width,
        height=image.height,
        classification=classification,
        neighbours=neighbours,
        context=ClinicalContext(
            anatom_site_general=_SITES.get(row.anatom_site_general or ""),
            age_approx=row.age_approx,
            sex=_SEXES.get(row.sex or ""),
        ),
        change=None,
        operating_points=points,
        policy=policy,
    )


def _as_arrays(answers: Sequence[tuple[Classification, Conclusion]]) -> CaseAnswers:
    risks = [conclusion.risk for _, conclusion in answers]
    return CaseAnswers(
        nine=np.array([[answer.probabilities[d] for d in Diagnosis] for answer, _ in answers]),
        sets=np.array([[d in answer.prediction_set for d in TRAINED] for answer, _ in answers]),
        outcome=np.array([conclusion.outcome.value for _, conclusion in answers]),
        level=np.array([risk.level.value if risk else "" for risk in risks]),
        urgency=np.array([risk.urgency.value if risk else "" for risk in risks]),
    )
