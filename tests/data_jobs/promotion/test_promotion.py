"""Promotion on real images: what is shown, what is refused, and that one row flips or nothing does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import sha256
import json
from pathlib import Path
from threading import Thread

import pytest

from data_jobs.promotion.candidate import PromotionRefused
from data_jobs.promotion.promotion import PromotionRequest, promote
from data_jobs.references.load import publish_bundled
from data_jobs.training.manifest_file import seal
from model_store.registry import ModelStore
from serve_app.domain.errors import Conflict, ModelContractError
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import LiveModel, live_model, publications, publish
from tests.model_folders import rewrite
from tests.pools import connected

from .conftest import MELANOMAS, OTHERS, answering, replace_references, weaken_melanoma

pytestmark = pytest.mark.usefixtures("archive")


@pytest.fixture
def request_for(answers_cache: Path) -> Callable[..., PromotionRequest]:
    def make(candidate: str, **changed: object) -> PromotionRequest:
        values = {"approved_by": "Dr Test", "reason": "annual update", "cache": answers_cache, **changed}
        return PromotionRequest(candidate, **values)

    return make


async def test_a_candidate_as_good_as_the_live_model_takes_its_place(
    served, store, model_id, make_candidate, request_for, tmp_path
) -> None:
    candidate = make_candidate(store)
    said: list[str] = []
    dry_run = request_for(candidate, dry_run=True, report=tmp_path / "report.json")
    await promote(served, store, dry_run, said.append)
    assert await answering(served) == model_id
    assert "nothing was changed" in said[-1]
    said.clear()
    target = await promote(served, store, request_for(candidate), said.append)
    assert sum("answers from" in line for line in said) == 3  # both models' are kept, and then it answers
    assert await answering(served) == candidate == target.model_id
    report = json.loads((store / f"{candidate}.promotion.json").read_text())
    # What the dry run said, but for who asked when.
    same = {"created": "", "dry_run": ""}
    assert {**report, **same} == {**json.loads((tmp_path / "report.json").read_text()), **same}
    assert report["accepted"]
    assert report["changed"] == []
    assert report["figures"]["live"] == report["figures"]["candidate"]
    assert report["figures"]["live"]["images"] == MELANOMAS + OTHERS
    assert report["mcnemar"]["first answer right"]["p_value"] == 1.0
    assert report["references"]["least_cosine"] > 0.999
    assert {name.partition(":")[0] for name in report["subgroups"]} == {"sex", "age", "site", "source"}
    async with connected(served) as pool:
        newest, first = await publications(pool)
        assert (newest.approval.action, newest.approval.approved_by) == ("promote", "Dr Test")
        text = (store / f"{candidate}.promotion.json").read_bytes()
        assert newest.approval.report_sha256 == sha256(text).hexdigest()
        assert first.approval.action == "publish"
        # Both spaces are there, side by side: a rollback needs nothing but the row.
        for model in (newest.model, first.model):
            space = ModelStore(store).open(model.model_id).manifest.live_space
            assert await ReferenceStore(pool).count(space.embedding_space) == space.count
    with pytest.raises(PromotionRefused, match="answers already"):
        await promote(served, store, request_for(candidate), said.append)


async def test_a_failing_criterion_refuses_and_every_changed_case_is_shown(
    served, store, model_id, make_candidate, request_for, tmp_path
) -> None:
    candidate = make_candidate(store, change=weaken_melanoma)
    said: list[str] = []
    report_path = tmp_path / "report.json"
    with pytest.raises(PromotionRefused, match="fails an acceptance criterion"):
        await promote(served, store, request_for(candidate, report=report_path), said.append)
    assert await answering(served) == model_id
    report = json.loads(report_path.read_text())
    assert not report["accepted"]
    failed = {verdict["criterion"] for verdict in report["acceptance"] if not verdict["kept"]}
    assert "max_melanoma_sensitivity_loss" in failed
    flagged = report["mcnemar"]["melanoma flagged"]
    assert flagged["cases"] == report["figures"]["live"]["melanoma_lesions"]
    assert flagged["lost"] > flagged["gained"] == 0
    text = "\n".join(said)
    assert report["changed"]
    for case in report["changed"]:
        assert case["isic_id"] in text
        assert "urgency" in case["changes"]
    assert "LESS URGENT" in text
    assert "FAILED" in text


async def test_an_altered_candidate_or_references_of_another_model_are_refused(
    served, store, model_id, make_candidate, request_for
) -> None:
    altered, foreign = make_candidate(store, "altered"), make_candidate(store, "foreign")
    path = store / altered / "model.onnx"
    content = path.read_bytes()
    rewrite(path, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelContractError, match=r"model\.onnx"):
        await promote(served, store, request_for(altered), print)
    replace_references(store / foreign)
    with pytest.raises(PromotionRefused, match="not embedded by this model"):
        await promote(served, store, request_for(foreign), print)
    assert await answering(served) == model_id


async def test_a_model_published_meanwhile_stops_the_flip(
    served, store, model_id, make_candidate, request_for
) -> None:
    """Evidence against one model is no evidence against another."""
    candidate, other = make_candidate(store), make_candidate(store, "other")

    def publish_another(line: str) -> None:
        # Said right before the row would flip; as another operator's command is, it is no part of this one.
        if "references loaded" in line:
            thread = Thread(target=lambda: asyncio.run(publish_bundled(served, store, other)))
            thread.start()
            thread.join()

    with pytest.raises(Conflict, match="by now"):
        await promote(served, store, request_for(candidate), publish_another)
    assert await answering(served) == other


async def test_what_cannot_be_compared_or_judged_is_refused(
    served, new_database, store, model_id, make_candidate, request_for, tmp_path
) -> None:
    candidate = make_candidate(store)
    given = tmp_path / "criteria.json"
    given.write_text('{"max_top1_loss": 1.0}')
    with pytest.raises(PromotionRefused, match="cannot replace"):
        await promote(served, store, request_for(candidate, acceptance=given), print)

    space = ModelStore(store).open(model_id).manifest.live_space.embedding_space
    same_space = make_candidate(
        store, "same_space", change=lambda content: content["spaces"][0].update(embedding_space=space)
    )
    with pytest.raises(PromotionRefused, match="space of its own"):
        await promote(served, store, request_for(same_space), print)

    without = make_candidate(store, "without")
    (store / without / "acceptance.json").unlink()
    seal(store / without)
    with pytest.raises(PromotionRefused, match="--acceptance"):
        await promote(served, store, request_for(without), print)
    await promote(
        served, store, request_for(without, acceptance=given, dry_run=True, report=tmp_path / "r.json"), print
    )

    async with connected(served) as pool:
        live = await live_model(pool)
        assert live is not None
        await publish(pool, LiveModel(model_id, "0" * 64, live.embedding_space))
    with pytest.raises(PromotionRefused, match="another digest"):
        await promote(served, store, request_for(candidate), print)

    with pytest.raises(PromotionRefused, match="No model answers yet"):
        await promote((await new_database()).owner, store, request_for(candidate), print)
