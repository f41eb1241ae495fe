"""A site's own operating points: measured on its own confirmed cases, and in force only when these prove them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
import json
from pathlib import Path

from data_jobs.promotion.answers import Cases, answer_cases, read_cases
from data_jobs.promotion.candidate import PromotionRefused
from data_jobs.references.load import read_bundle
from data_jobs.training.dataset import labels_of
from data_jobs.training.evaluation.predictions import known_eight
from data_jobs.training.operating_points import ChosenThreshold, lesion_scores, measure_threshold
from deployments.preprocess.pixels import PREPROCESS_VERSION
from deployments.risk.policy import read_policy
from model_store.registry import ModelStore, StoredModel
from serve_app.records.pool import open_pool
from serve_app.records.serving import Approval, live_model, set_operating_points

#: What the site's own lesions must prove of a point that flags fewer than the model's: one-sided 95 % bound.
LEAST_SENSITIVITY = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRequest:
    """Which thresholds by name (none: the model's own again), on which cases, and who answers for them.

    `report`: where the report goes (None: beside the model). `cache`: where answers are kept.
    """

    points: Mapping[str, float]
    approved_by: str
    reason: str
    cache: Path
    cases: Path | None = None
    report: Path | None = None
    dry_run: bool = False
    threads: int = 1


async def set_site_points(
    owner_dsn: str, models: Path, request: SiteRequest, say: Callable[[str], None]
) -> None:
    """Measure the points on the site's cases, report, and let them hold for the model that answers.

    Raises PromotionRefused when no model answers, it has no such point, the cases are its own references, or they do
    not prove the sensitivity; Conflict when the model or its points changed meanwhile. Nothing has changed then.
    """
    pool = await open_pool(owner_dsn, minimum=0, maximum=1, timeout_s=60)
    try:
        live = await live_model(pool)
        if live is None:
            raise PromotionRefused("No model answers yet: `derm-cds references load` first.")
        model = ModelStore(models).open(live.model_id)
        if model.digest != live.model_digest:
            raise PromotionRefused(f"{model.folder} is not the {live.model_id} that answers.")
        digest = None
        if request.points:
            path, text, refusal = _gather_evidence(models, model, request, say)
            if refusal:
                raise PromotionRefused(f"{refusal} Nothing was changed. The report is {path}.")
            digest = sha256(text.encode()).hexdigest()
        if request.dry_run:
            say("Nothing was changed.")
            return
        approval = Approval(approved_by=request.approved_by, reason=request.reason, report_sha256=digest)
        await set_operating_points(pool, live, request.points, approval)
        at = "the site's" if request.points else "its own"
        say(f"{live.model_id} answers at {at} operating points, within seconds in a running service.")
    finally:
        await pool.close()


def _gather_evidence(
    models: Path, model: StoredModel, request: SiteRequest, say: Callable[[str], None]
) -> tuple[Path, str, str]:
    """Measure, print and write the report: its path, its text, and why the points must not hold ("" when they may)."""
    known = model.manifest.operating_points
    for name, threshold in request.points.items():
        if name not in known:
            raise PromotionRefused(
                f"{model.manifest.model_id} has no operating point {name!r}: {', '.join(known)}."
            )
        if not 0.0 < threshold < 1.0:
            raise PromotionRefused(f"{name} must be a probability between 0 and 1, not {threshold:g}.")
    if request.cases is None:
        raise PromotionRefused("A site's own operating points need its own confirmed cases.")
    cases = read_cases("site", model, request.cases)
    _require_unseen(model, cases)
    answers = answer_cases(model, cases, read_policy(), cache=request.cache, threads=request.threads, say=say)
    eight, labels = known_eight(answers.nine), labels_of(list(cases.rows))
    lesions = [row.lesion for row in cases.rows]
    figures: dict[str, dict[str, ChosenThreshold]] = {}
    refusals = []
    for name, threshold in request.points.items():
        scores, positive = lesion_scores(eight, labels, lesions, known[name].diagnoses)
        if positive.all() or not positive.any():
            raise PromotionRefused(f"{cases.archive} must hold lesions that {name} is to flag, and others.")
        own, site = (measure_threshold(scores, positive, at) for at in (known[name].threshold, threshold))
        figures[name] = {"model": own, "site": site}
        for whose, found in figures[name].items():
            say(
                f"{name} at {found.threshold:.6f} ({whose}): {found.misses} of {found.positives} lesions missed "
                f"(sensitivity {found.sensitivity:.3f}, at least {found.lower_bound:.3f}), specificity "
                f"{found.specificity:.3f} of {found.negatives}"
            )
        # A stricter point than the shipped one misses no more than that does.
        if threshold > own.threshold and site.lower_bound < LEAST_SENSITIVITY:
            refusals.append(
                f"{name}: these cases prove a sensitivity of {site.lower_bound:.3f}, and not of {LEAST_SENSITIVITY}."
            )
    content = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "approved_by": request.approved_by,
        "reason": request.reason,
        "model": {"model_id": model.manifest.model_id, "model_digest": model.digest},
        "cases": {"images": len(cases.rows), "metadata_sha256": cases.digest},
        "preprocess_version": PREPROCESS_VERSION,
        "accepted": not refusals,
        "points": {
            name: {whose: asdict(found) for whose, found in both.items()} for name, both in figures.items()
        },
    }
    text = json.dumps(content, indent=1) + "\n"
    path = request.report or models / f"{model.manifest.model_id}.site.json"
    path.write_text(text, encoding="utf-8")
    return path, text, " ".join(refusals)


def _require_unseen(model: StoredModel, cases: Cases) -> None:
    """Refuse cases that the model ships as references: on what it learned from, any threshold looks good."""
    shipped = {image.isic_id for space in model.manifest.spaces for image in read_bundle(model, space).images}
    if seen := [row.isic_id for row in cases.rows if row.isic_id in shipped]:
        raise PromotionRefused(
            f"{len(seen)} of the {len(cases.rows)} cases are the model's own references (the first: {seen[0]})."
        )
