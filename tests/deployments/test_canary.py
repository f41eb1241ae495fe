"""Canaries: a replica that answers wrongly is found and answers nobody; a slow one goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import logging
from pathlib import Path
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from deployments import canary as canaries
from deployments.canary import EVERY_S, Canaries
from deployments.classifier.classifier import Classifier
from deployments.embedder.embedder import Embedder
from model_store.canary import CANARY_NAME, read_canary, write_canary
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession, Outputs
from serve_app.domain.errors import ModelContractError, StageFailed
from serve_app.records.serving import LiveModel
from tests.model_folders import copy_model


@pytest.fixture
def gauges() -> dict[str, list[float]]:
    return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(canaries, "monotonic", lambda: now.s)
    return now


@pytest.fixture
def watch(gauges, clock) -> Callable[..., Canaries]:
    """`watch(0.2, 7.0, ...)`: canaries that answer so, then 0; what is raised is raised."""

    def make(*answers: float | BaseException | None) -> Canaries:
        left = list(answers)

        async def prove() -> float | None:
            answer = left.pop(0) if left else 0.0
            if isinstance(answer, BaseException):
                raise answer
            return answer

        def gauge(name: str, description: str) -> SimpleNamespace:
            assert description
            return SimpleNamespace(set=gauges.setdefault(name, []).append)

        return Canaries(prove, gauge)

    return make


async def healthy(watched: Canaries, checks: int) -> bool:
    """So many health checks, the canary of each answered before the next."""
    for _ in range(checks):
        try:
            watched.check()
        except StageFailed:
            return False
        if watched._asking is not None:
            await watched._asking
    return True


async def test_three_wrong_answers_in_a_row_and_no_fewer(watch, gauges, caplog) -> None:
    wrong = (2.0, float("nan"), RuntimeError("of a library"))
    for count in (1, 2):
        watched = watch(*wrong[:count])
        assert await healthy(watched, 6)
        watched.require_sound()
        assert gauges["derm_canary_failures"][-1] == 0
    watched = watch(*wrong)
    with caplog.at_level(logging.ERROR, "derm.canary"):
        assert not await healthy(watched, 4)
    with pytest.raises(StageFailed):
        watched.require_sound()
    assert gauges["derm_canary_failures"][-3:] == [1, 2, 3]
    assert [record.getMessage()[:20] for record in caplog.records[-3:]] == [
        f"Canary {n} of 3 failed" for n in (1, 2, 3)
    ]
    # It stays so: one right answer between wrong ones proves nothing of the answers in between.
    assert not await healthy(watched, 1)


async def test_it_is_asked_at_once_then_every_hour_and_after_a_wrong_answer_at_the_next_health_check(
    watch, gauges, clock
) -> None:
    watched = watch(0.1, 0.2, 3.0, 0.3)
    assert await healthy(watched, 50)
    assert gauges["derm_canary_off"] == [0.1]
    clock.s = EVERY_S - 1
    assert await healthy(watched, 2)
    clock.s = EVERY_S
    assert await healthy(watched, 2)
    assert gauges["derm_canary_off"] == [0.1, 0.2]
    clock.s = 2 * EVERY_S
    assert await healthy(watched, 2)
    assert gauges["derm_canary_off"] == [0.1, 0.2, 3.0, 0.3]
    assert gauges["derm_canary_failures"] == [0, 0, 1, 0]
    assert gauges["derm_canary_passed_at"] == sorted(gauges["derm_canary_passed_at"])


async def test_a_model_without_a_canary_passes_and_the_gauge_says_so(watch, gauges) -> None:
    assert await healthy(watch(None), 3)
    assert (gauges["derm_canary_passed_at"], gauges["derm_canary_failures"]) == ([0.0], [0])
    assert gauges["derm_canary_off"] == []


async def test_a_slow_canary_is_not_wrong_and_is_asked_once(gauges, clock) -> None:
    asked, answer = [], asyncio.Event()

    async def prove() -> float:
        asked.append(clock.s)
        await answer.wait()
        return 0.5

    watched = Canaries(prove, lambda name, _: SimpleNamespace(set=gauges.setdefault(name, []).append))
    for second in range(0, 30_000, 5):
        clock.s = second
        watched.check()
        watched.require_sound()
    await asyncio.sleep(0)
    answer.set()
    await watched._asking
    assert (len(asked), gauges["derm_canary_failures"]) == (1, [0])


@pytest.fixture(scope="module", params=["one network", "an ensemble"])
def kept(request, models: Path, model_id: str) -> StoredModel:
    """Each model that ships."""
    ids = {
        "one network": model_id,
        "an ensemble": next(name for name in ModelStore(models) if name != model_id),
    }
    return ModelStore(models).open(ids[request.param])


@pytest.fixture
def live(kept: StoredModel) -> LiveModel:
    return LiveModel(kept.manifest.model_id, kept.digest, kept.manifest.live_space.embedding_space)


def spoil(session: InferenceSession, change: Callable[[Outputs], Outputs]) -> None:
    """Have a session's answers be others, as if its weights had changed in memory."""
    run = session.run
    session.run = lambda pixels: change(run(pixels))  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Outputs], Outputs]] = {
    "a logit by a hundredth": lambda o: o._replace(logits=o.logits + np.eye(8, dtype=np.float32)[2] / 100),
    "all by half a percent": lambda o: o._replace(logits=o.logits * np.float32(1.005)),
    "one number of the bottleneck": lambda o: o._replace(
        bottleneck=o.bottleneck + (np.arange(512) == 3) * np.float32(0.01 * np.abs(o.bottleneck).max())
    ),
    "not a number": lambda o: o._replace(bottleneck=o.bottleneck * np.float32("nan")),
    "of another image": lambda o: o._replace(logits=o.logits[:, ::-1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_session_that_went_wrong_is_found(kept, live, change) -> None:
    classifier = Classifier(ModelStore(kept.folder.parent), threads=1)
    classifier.warm([live])
    off = classifier.prove()
    assert off is not None
    assert off < 0.1  # this machine's kernels
    spoil(classifier._loaded.get(live.model_id).session, change)
    try:
        off = classifier.prove()
    except StageFailed:
        return
    assert off > 1.0


def test_thresholds_that_changed_in_memory_are_found(kept, live) -> None:
    classifier = Classifier(ModelStore(kept.folder.parent), threads=1)
    classifier.warm([live])
    classifier._loaded.get(live.model_id).calibrator.thresholds[:] = 0.0
    assert classifier.prove() == float("inf")


def test_an_embedding_space_that_went_wrong_is_found(kept, live) -> None:
    embedder = Embedder(ModelStore(kept.folder.parent))
    embedder.warm([live])
    assert embedder.prove() < 0.1
    embedder.load(live.model_id, live.embedding_space).matrix[7, 9] += 1.0
    assert embedder.prove() > 1.0


@pytest.fixture
def copied(kept: StoredModel, tmp_path: Path) -> StoredModel:
    """The model in a store of its own, whose canary may be changed."""
    shutil.copytree(kept.folder, tmp_path / kept.folder.name)
    return ModelStore(tmp_path).open(kept.folder.name)


def test_a_model_whose_known_answer_is_another_is_not_loaded(copied, live) -> None:
    """As on a machine that computes wrongly: the replica does not start, and a candidate is not ready."""
    known = read_canary(copied)
    known.nine[:] = known.nine[::-1].copy()
    known.vectors[live.embedding_space][:] *= -1
    write_canary(copied, known)
    for stage in (
        Classifier(ModelStore(copied.folder.parent), threads=1),
        Embedder(ModelStore(copied.folder.parent)),
    ):
        with pytest.raises(ModelContractError, match="known answer"):
            stage.warm([live])
        assert stage.prove() is None  # it is held to no model that it has not loaded


def test_a_canary_is_its_models_own_and_a_damaged_one_is_refused(copied, live, tmp_path, caplog) -> None:
    assert CANARY_NAME not in copied.manifest.files  # it is no part of which model it is
    other = copy_model(copied.folder, tmp_path, "another")
    assert read_canary(ModelStore(tmp_path).open(other)) is None
    (copied.folder / CANARY_NAME).unlink()
    classifier = Classifier(ModelStore(tmp_path), threads=1)
    classifier.warm([live])
    assert classifier.prove() is None
    assert "no canary" in caplog.text
    for content in (b"", b"PK\x03\x04", (live.model_id * 90).encode()):
        (copied.folder / CANARY_NAME).write_bytes(content)
        with pytest.raises(ModelContractError, match="damaged"):
            read_canary(copied)
