"""What a model answers to confirmed cases, by the served code from the file's bytes to the urgency; answers are kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.references.load import ReferenceBundle, read_bundle
from data_jobs.training.dataset import LabelledImage, isic_folder, read_rows
from deployments.classifier.calibration import Calibrator
from deployments.embedder.embedder import EmbeddingSpace
from deployments.preprocess.pixels import PREPROCESS_VERSION, InputGeometry
from deployments.preprocess.preprocess import PreparedImage, prepare_image
from deployments.risk.policy import POLICIES, RiskPolicy
from deployments.risk.risk import conclude
from deployments.risk.rules import Findings
from model_store.registry import StoredModel
from model_store.session import InferenceSession
from serve_app.domain.assessment import WEIGHED, Classification, Conclusion, Neighbours, SimilarCase
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import DermError, RejectedUpload
from serve_app.domain.patient import AnatomSite, ClinicalContext, Sex


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


BATCH = 16
_SITES = {site.value: site for site in AnatomSite}
_SEXES = {sex.value: sex for sex in Sex}


@dataclass(frozen=True, slots=True)
class CaseAnswers:
    """One model's answers to N cases.

    nine: N×9 probabilities in the order of `Diagnosis`. sets: N×8 membership of the prediction
    set in the order of `TRAINED`. outcome and urgency: N strings; the latter is empty where the
    image was refused.
    """

    nine: NDArray[np.float64]
    sets: NDArray[np.bool_]
    outcome: NDArray[np.str_]
    urgency: NDArray[np.str_]


def _answer(model: StoredModel, cases: Cases, policy: RiskPolicy, threads: int) -> CaseAnswers:
    session = InferenceSession(model, threads=threads)
    calibrator = Calibrator.from_model(model)
    space = EmbeddingSpace.from_model(model, model.manifest.live_space)
    search = ReferenceSearch(read_bundle(model, model.manifest.live_space))
    geometry = InputGeometry.from_manifest(model.manifest.input)
    points = {name: point.threshold for name, point in model.manifest.operating_points.items()}
    classified: list[Classification] = []
    concluded: list[Conclusion] = []
    with ThreadPoolExecutor(threads) as pool:
        for start in tqdm(
            range(0, len(cases.rows), BATCH), model.manifest.model_id, unit=" batches", mininterval=5.0
        ):
            part = cases.rows[start : start + BATCH]
            images = list(pool.map(lambda row: _prepare(row, cases.archive, geometry), part))
            outputs = session.run(np.stack([image.pixels for image in images]))
            found = calibrator.classify(outputs)
            classified += found
            for row, image, classification, vector in zip(
                part, images, found, space.embed(outputs.bottleneck), strict=True
            ):
                neighbours = search.nearest(vector, k=WEIGHED, lesion=row.lesion)
                context = ClinicalContext(
                    anatom_site_general=_SITES.get(row.anatom_site_general or ""),
                    age_approx=row.age_approx,
                    sex=_SEXES.get(row.sex or ""),
                )
                findings = Findings(
                    image.quality, image.width, image.height, classification, neighbours, context, change=None
                )
                concluded.append(conclude(findings, policy, points))
    risks = [conclusion.risk for conclusion in concluded]
    return CaseAnswers(
        nine=np.array([[answer.probabilities[d] for d in Diagnosis] for answer in classified]),
        sets=np.array([[d in answer.prediction_set for d in TRAINED] for answer in classified]),
        outcome=np.array([conclusion.outcome.value for conclusion in concluded]),
        urgency=np.array([risk.urgency.value if risk else "" for risk in risks]),
    )


def _prepare(row: LabelledImage, archive: Path, geometry: InputGeometry) -> PreparedImage:
    path = archive / row.path
    try:
        return prepare_image(path.read_bytes(), geometry, ARCHIVE_LIMITS)
    except RejectedUpload as error:
        raise DermError(f"{path}: {error}") from error


CaseKind = Literal["held-out", "references"]
#: The fold that no recipe trains, calibrates or chooses on.
HELD_OUT_FOLD = 0
# Changed whenever answers to the same cases may change for another reason than those in the key.
_ANSWERS_VERSION = "2"


@dataclass(frozen=True, slots=True)
class Cases:
    """Confirmed cases to compare on, the archive they lie in, and a digest over all their metadata."""

    kind: CaseKind
    rows: tuple[LabelledImage, ...]
    archive: Path
    digest: str


def read_cases(kind: CaseKind, live: StoredModel) -> Cases:
    """Choose the cases: the held-out fold, or the references that the live model ships.

    Raises DermError when the archive is not there or lacks them.
    """
    archive = isic_folder()
    try:
        rows = read_rows(archive)
    except FileNotFoundError:
        raise DermError(
            f"{archive} has no train.csv: set DERM_ISIC_DIR to the archive of labelled images."
        ) from None
    if kind == "held-out":
        chosen = tuple(row for row in rows if row.fold == HELD_OUT_FOLD)
    else:
        shipped = {image.isic_id for image in read_bundle(live, live.manifest.live_space).images}
        chosen = tuple(row for row in rows if row.isic_id in shipped)
    if not chosen:
        raise DermError(f"{archive} holds none of the {kind} cases.")
    digest = sha256()
    for row in chosen:
        digest.update(repr(row).encode())
    return Cases(kind, chosen, archive, digest.hexdigest())


def answer_cases(
    model: StoredModel,
    cases: Cases,
    policy: RiskPolicy,
    *,
    cache: Path,
    threads: int,
    say: Callable[[str], None],
) -> CaseAnswers:
    """Answer every case as the service would, with the model's own references and operating points.

    What the archive knows of a patient (age, sex, site) is the context; nothing is known of an earlier visit.
    Answers that were given before are read from `cache`: what they depend on, the model's digest, the cases,
    preprocess and policy, names the file. Raises StageFailed when the model's output is not finite,
    ModelContractError when it lacks what the policy asks for.
    """
    policy_digest = sha256((POLICIES / f"{policy.version}.toml").read_bytes()).hexdigest()
    parts = (_ANSWERS_VERSION, model.digest, cases.digest, PREPROCESS_VERSION, policy_digest, str(WEIGHED))
    name = model.manifest.model_id
    path = cache / f"{name}-{sha256(' '.join(parts).encode()).hexdigest()[:16]}.npz"
    if path.exists():
        say(f"{name}: {len(cases.rows)} answers from {path}")
        with np.load(path, allow_pickle=False) as arrays:
            return CaseAnswers(**arrays)
    cache.mkdir(parents=True, exist_ok=True)
    answers = _answer(model, cases, policy, threads)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **asdict(answers))
    partial.rename(path)
    return answers
