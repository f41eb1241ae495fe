"""A filled and verified space goes live by the one row that says which model answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_jobs.references.embedder import space_spec
from data_jobs.references.verify import verify_space
from model_store.registry import ModelStore
from serve_app.domain.errors import Conflict
from serve_app.records.pool import Pool
from serve_app.records.serving import Approval, LiveModel, live_model, publish_when_ready


async def publish_space(
    pool: Pool,
    models: Path,
    model_id: str,
    *,
    embedding_space: str | None = None,
    folder: Path | None = None,
    approval: Approval | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LiveModel:
    """Verify a model's space and let the model answer in it, from the next request on.

    Raises Conflict when a check fails, and nothing has changed then. Safe to repeat.
    """
    before = await live_model(pool)
    model = ModelStore(models).open(model_id)
    spec = space_spec(model, embedding_space)
    checks = await verify_space(pool, model, spec.embedding_space, folder=folder)
    for check in checks:
        say(f"{'ok' if check.passed else 'NO':>3}  {check.name}: {check.found}")
    if failed := [check.name for check in checks if not check.passed]:
        raise Conflict(f"{spec.embedding_space} must not answer: {', '.join(failed)}.")
    target = LiveModel(model_id, model.digest, spec.embedding_space)
    await publish_when_ready(pool, target, approval, over=before)
    return target
