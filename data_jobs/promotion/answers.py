"""What a model answers to confirmed cases, by the served code from the file's bytes to the urgency; answers are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_jobs.references.load import read_bundle
from data_jobs.training.dataset import LabelledImage, isic_folder, read_rows
from data_jobs.training.evaluation.outcomes import LocalService
from deployments.preprocess.pixels import PREPROCESS_VERSION
from deployments.risk.policy import POLICIES, RiskPolicy
from model_store.registry import StoredModel
from serve_app.domain.assessment import WEIGHED
from serve_app.domain.errors import DermError


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


#: Cases whose pixels are in memory at a time.
_PART = 128


def _answer(model: StoredModel, cases: Cases, policy: RiskPolicy, threads: int) -> CaseAnswers:
    service = LocalService(model, policy, threads=threads)
    parts = [cases.rows[start : start + _PART] for start in range(0, len(cases.rows), _PART)]
    found = [
        service.answer(part, service.prepare(part, cases.archive))
        for part in tqdm(parts, model.manifest.model_id, mininterval=5.0)
    ]
    names = ("nine", "sets", "outcomes", "urgencies")
    return CaseAnswers(*(np.concatenate([getattr(part, name) for part in found]) for name in names))


CaseKind = Literal["held-out", "references", "site"]
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


def read_cases(kind: CaseKind, live: StoredModel, folder: Path | None = None) -> Cases:
    """Choose the cases: the held-out fold, the references that the live model ships, or all of a site's own folder.

    Raises DermError when the archive is not there, cannot be read, or lacks them.
    """
    archive = folder or isic_folder()
    try:
        rows = read_rows(archive)
    except FileNotFoundError:
        raise DermError(
            f"{archive} has no train.csv"
            + ("." if folder else ": set DERM_ISIC_DIR to the archive of labelled images.")
        ) from None
    except (KeyError, ValueError) as error:
        raise DermError(f"{archive / 'train.csv'} cannot be read: {error}.") from None
    if kind == "held-out":
        chosen = tuple(row for row in rows if row.fold == HELD_OUT_FOLD)
    elif kind == "site":
        chosen = tuple(rows)
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
