"""Promotion: the evidence first, then the references into their own space, then one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from data_jobs.promotion.acceptance import judge, read_plan, report_json, report_text
from data_jobs.promotion.answers import CaseKind, answer_cases, read_cases
from data_jobs.promotion.candidate import (
    PromotionRefused,
    fill_space,
    open_whole,
    prove_references,
    require_references,
    require_verified,
)
from data_jobs.promotion.comparison import compare
from deployments.preprocess.pixels import PREPROCESS_VERSION
from deployments.risk.policy import read_policy
from model_store.registry import ModelStore, StoredModel
from serve_app.records.pool import open_pool
from serve_app.records.serving import Approval, LiveModel, live_model, publish_when_ready


@dataclass(frozen=True, slots=True)
class PromotionRequest:
    """What to promote, on which evidence, and who answers for it.

    `report`: where the report goes (None: beside the candidate). `cache`: where answers are kept.
    """

    candidate: str
    approved_by: str
    reason: str
    cache: Path
    kind: CaseKind = "held-out"
    acceptance: Path | None = None
    report: Path | None = None
    dry_run: bool = False
    threads: int = 1


async def promote(
    owner_dsn: str, models: Path, request: PromotionRequest, say: Callable[[str], None]
) -> LiveModel:
    """Compare, judge and report; then let the candidate answer, unless this is a dry run.

    Returns the model that answers afterwards. Raises PromotionRefused when a criterion fails, the
    candidate cannot be compared or its space fails a check, ModelContractError when a model must not be loaded,
    Conflict when another model was published meanwhile, or the candidate is not ready in every replica of a running
    service in time: the live model then goes on answering.
    """
    # Checking a space reads all of it.
    pool = await open_pool(owner_dsn, minimum=0, maximum=1, timeout_s=60)
    try:
        answering = await live_model(pool)
        if answering is None:
            raise PromotionRefused(
                "No model answers yet, so there is nothing to compare with: `derm-cds references load` first."
            )
        store = ModelStore(models)
        candidate = open_whole(store, request.candidate)
        live = store.open(answering.model_id)
        if live.digest != answering.model_digest:
            raise PromotionRefused(
                f"{live.folder} is not the {answering.model_id} that answers (its manifest has another digest): "
                "nothing can be compared with it."
            )
        if candidate.digest == live.digest:
            raise PromotionRefused(f"{request.candidate} answers already.")
        await require_references(pool, candidate, answering)
        path, text, accepted = _gather_evidence(models, candidate, live, request, say)
        if not accepted:
            raise PromotionRefused(
                f"{request.candidate} fails an acceptance criterion; {answering.model_id} goes on answering. "
                f"The report is {path}."
            )
        if request.dry_run:
            say(f"{request.candidate} keeps every criterion; nothing was changed. The report is {path}.")
            return answering
        say(await fill_space(pool, candidate))
        await require_verified(pool, candidate)
        # All that took minutes: what was changed meanwhile would be refused by every replica.
        if ModelStore(models).open(request.candidate).digest != candidate.digest:
            raise PromotionRefused(f"{candidate.folder} was changed while it was compared.")
        approval = Approval("promote", request.approved_by, request.reason, sha256(text.encode()).hexdigest())
        target = LiveModel(request.candidate, candidate.digest, candidate.manifest.live_space.embedding_space)
        await publish_when_ready(pool, target, approval, over=answering)
        say(f"{request.candidate} answers from the next request on. The report is {path}.")
        return target
    finally:
        await pool.close()


def _gather_evidence(
    models: Path,
    candidate: StoredModel,
    live: StoredModel,
    request: PromotionRequest,
    say: Callable[[str], None],
) -> tuple[Path, str, bool]:
    """Run the comparison, print it and write the report: its path, its text, and the verdict."""
    plan = read_plan(candidate, request.acceptance)
    cases = read_cases(request.kind, live)
    proof = prove_references(candidate, live, threads=request.threads)
    policy = read_policy()
    before, after = (
        answer_cases(model, cases, policy, cache=request.cache, threads=request.threads, say=say)
        for model in (live, candidate)
    )
    comparison = compare(before, after, cases.rows, live_model=live, candidate_model=candidate)
    verdicts = judge(plan, comparison)
    circumstances = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "approved_by": request.approved_by,
        "reason": request.reason,
        "dry_run": request.dry_run,
        "live": {"model_id": live.manifest.model_id, "model_digest": live.digest},
        "candidate": {"model_id": candidate.manifest.model_id, "model_digest": candidate.digest},
        "cases": {"kind": cases.kind, "images": len(cases.rows), "metadata_sha256": cases.digest},
        "policy_version": policy.version,
        "preprocess_version": PREPROCESS_VERSION,
        "references": asdict(proof),
    }
    text = report_json(comparison, verdicts, circumstances)
    path = request.report or models / f"{request.candidate}.promotion.json"
    path.write_text(text, encoding="utf-8")
    say(report_text(comparison, verdicts))
    return path, text, all(verdict.kept for verdict in verdicts)
