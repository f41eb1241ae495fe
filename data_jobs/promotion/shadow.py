"""Shadow: live and candidate over the same confirmed cases, the live model's answers kept for the next time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from data_jobs.promotion.answers import CaseAnswers, answer_cases
from data_jobs.references.load import read_bundle
from data_jobs.training.dataset import LabelledImage, isic_folder, read_rows
from deployments.preprocess.resize import PREPROCESS_VERSION
from deployments.risk.policy import RiskPolicy
from deployments.risk.policy_file import POLICIES
from model_store.registry import StoredModel
from serve_app.domain.assessment import WEIGHED
from serve_app.domain.errors import DermError

CaseKind = Literal["held-out", "references"]
#: The fold that no recipe trains, calibrates or chooses on.
HELD_OUT_FOLD = 0
# Changed whenever answers to the same cases may change for another reason than those in the key.
_ANSWERS_VERSION = "1"

Say = Callable[[str], None]


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


def shadow(
    model: StoredModel, cases: Cases, policy: RiskPolicy, *, cache: Path, threads: int, say: Say
) -> CaseAnswers:
    """Answer the cases with a model; answers that were given before are read from `cache`.

    What the answers depend on names the file: the model's digest, the cases, preprocess and policy.
    """
    policy_digest = sha256((POLICIES / f"{policy.version}.toml").read_bytes()).hexdigest()
    parts = (_ANSWERS_VERSION, model.digest, cases.digest, PREPROCESS_VERSION, policy_digest, str(WEIGHED))
    path = cache / f"{model.manifest.model_id}-{sha256(' '.join(parts).encode()).hexdigest()[:16]}.npz"
    name = model.manifest.model_id
    if path.exists():
        say(f"{name}: {len(cases.rows)} answers from {path}")
        return CaseAnswers.read(path)
    cache.mkdir(parents=True, exist_ok=True)
    total = len(cases.rows)

    def progress(done: int) -> None:
        if done % 320 == 0 or done == total:
            say(f"{name}: {done} of {total} cases")

    answers = answer_cases(model, cases.rows, cases.archive, policy, threads=threads, progress=progress)
    answers.write(path)
    return answers
