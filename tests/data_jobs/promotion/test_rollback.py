"""Rollback: the same row back, one publication at a time, and never to what is no longer whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from data_jobs.promotion.candidate import PromotionRefused
from data_jobs.promotion.rollback import roll_back
from data_jobs.references.load import publish_bundled
from serve_app.domain.errors import Conflict
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import publications
from tests.model_folders import rewrite
from tests.pools import connected

from .conftest import answering


def back(dsn: str, store: Path):
    return roll_back(dsn, store, approved_by="Dr Test", reason="complaints")


async def test_it_goes_back_one_publication_at_a_time(served, store, model_id, make_candidate) -> None:
    second, third = make_candidate(store, "second"), make_candidate(store, "third")
    for candidate in (second, third):
        await publish_bundled(served, store, candidate)
    assert (await back(served, store)).model_id == second
    # A start of the service publishes what answers already: that is no new entry.
    await publish_bundled(served, store, second)
    assert (await back(served, store)).model_id == model_id
    assert await answering(served) == model_id
    with pytest.raises(PromotionRefused, match="nothing was published before"):
        await back(served, store)
    await publish_bundled(served, store, third)
    assert (await back(served, store)).model_id == model_id
    async with connected(served) as pool:
        entries = await publications(pool)
        actions = [(entry.approval.action, entry.model.model_id) for entry in reversed(entries)]
        assert actions == [
            ("publish", model_id),
            ("publish", second),
            ("publish", third),
            ("rollback", second),
            ("rollback", model_id),
            ("publish", third),
            ("rollback", model_id),
        ]
        taken_back = [entry.approval.takes_back for entry in reversed(entries)]
        first = entries[-1].publication_id
        assert taken_back == [None, None, None, first + 2, first + 1, None, first + 5]
        # The space of the model that was taken back stays: it may be promoted again.
        assert await ReferenceStore(pool).count(f"{third}.space1") == 300


async def test_a_model_whose_folder_is_gone_or_altered_or_without_references_does_not_come_back(
    served, store, model_id, make_candidate
) -> None:
    candidate = make_candidate(store)
    await publish_bundled(served, store, candidate)
    folder = store / model_id
    onnx = (folder / "model.onnx").read_bytes()
    rewrite(folder / "model.onnx", onnx[:-1] + bytes([onnx[-1] ^ 1]))
    with pytest.raises(PromotionRefused, match=r"model\.onnx is not the file"):
        await back(served, store)
    rewrite(folder / "model.onnx", onnx)
    manifest = folder / "manifest.toml"
    text = manifest.read_text()
    rewrite(manifest, text.replace('licence = "CC-BY-NC-4.0"', 'licence = "CC0"').encode())
    with pytest.raises(PromotionRefused, match="another digest"):
        await back(served, store)
    folder.rename(store / "away")
    with pytest.raises(PromotionRefused, match="does not exist"):
        await back(served, store)
    assert await answering(served) == candidate
    (store / "away").rename(folder)
    rewrite(manifest, text.encode())
    assert (await back(served, store)).model_id == model_id
    await publish_bundled(served, store, candidate)
    async with connected(served) as pool:
        await pool.execute("DELETE FROM reference_embeddings WHERE embedding_space NOT LIKE '%.space1'")
    with pytest.raises(PromotionRefused, match="0 references of 300"):
        await back(served, store)
    assert await answering(served) == candidate


async def test_two_rollbacks_at_once_go_back_one_step(served, store, model_id, make_candidate) -> None:
    second, third = make_candidate(store, "second"), make_candidate(store, "third")
    for candidate in (second, third):
        await publish_bundled(served, store, candidate)
    outcomes = await asyncio.gather(*(back(served, store) for _ in range(2)), return_exceptions=True)
    refused = [o for o in outcomes if isinstance(o, BaseException)]
    # Both began with `third` answering: the later finds another model and gives up. Or it began after.
    assert all(isinstance(o, Conflict) for o in refused)
    assert await answering(served) == (second if refused else model_id)


async def test_the_history_cannot_be_rewritten(served) -> None:
    connection = await asyncpg.connect(served)
    try:
        for statement in ("UPDATE publications SET reason = 'x'", "DELETE FROM publications"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()
