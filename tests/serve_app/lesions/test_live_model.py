"""A published model that is not whole here does not take over, and the service says so."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
import shutil
import tomllib

import pytest
import tomli_w

from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore
from serve_app.domain.errors import Conflict, ModelContractError, StageFailed
from serve_app.lesions.live_model import PERIOD_S, LiveModelWatch
from serve_app.records import serving
from serve_app.records.pool import open_pool
from serve_app.records.serving import LiveModel, live_model, publish, publish_when_ready
from serve_app.worker import Worker, every
from tests.serve_app.conftest import until


@pytest.fixture
async def pool(new_database):
    urls = await new_database()
    pool = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=20)
    yield pool
    await pool.close()


@pytest.fixture
def store(models: Path, model_id: str, tmp_path: Path) -> Path:
    """A store of this test's own."""
    shutil.copytree(models / model_id, tmp_path / model_id)
    return tmp_path


class Stages:
    """What the watch asks of the stages: two replicas of a stage over one store, as slow as a test wants them."""

    def __init__(self, store: Path) -> None:
        self.store = ModelStore(store)
        self.asked: list[tuple[str, ...]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.broken: str | None = None

    async def warm(self, models: Sequence[LiveModel]) -> list[Mapping[str, str]]:
        self.asked.append(tuple(model.model_id for model in models))
        await self.go.wait()
        if self.broken in self.asked[-1]:
            raise StageFailed(f"classifier cannot load {self.broken}.")
        return [self.store.warm(models)] * 2


@pytest.fixture
async def stages(store: Path) -> Stages:
    return Stages(store)


@pytest.fixture
def next_id(store: Path, model_id: str) -> str:
    """Another model in this test's store."""
    content = tomllib.loads((store / model_id / MANIFEST_NAME).read_text())
    content |= {"model_id": f"{content['architecture']}.next", "tag": "next"}
    shutil.copytree(store / model_id, store / content["model_id"])
    (store / content["model_id"] / MANIFEST_NAME).write_text(tomli_w.dumps(content))
    return content["model_id"]


@asynccontextmanager
async def running(watch: LiveModelWatch):
    """Let a watch work in the background, as an ingress replica does."""
    loops = {
        "live_model": every(PERIOD_S, watch.follow, first_after_s=0),
        "replica_report": every(serving.REPORT_EVERY_S, watch.report, first_after_s=0, last=watch.leave),
    }
    async with Worker().running(loops):
        yield


def published(store: Path, shipped: str, **changes: str) -> LiveModel:
    model = ModelStore(store).open(shipped)
    found = LiveModel(shipped, model.digest, model.manifest.live_space.embedding_space)
    return replace(found, **changes)


@pytest.fixture
async def old(pool, store, model_id) -> LiveModel:
    """The model that is published to begin with."""
    await publish(pool, model := published(store, model_id))
    return model


@pytest.fixture
async def watch(pool, store, stages, old) -> LiveModelWatch:
    """A watch that has it."""
    watch = LiveModelWatch(pool, store, stages.warm)
    assert await watch.current() == old
    return watch


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_id": "no_model.here"}, "does not exist"),
        ({"model_digest": "0" * 64}, "is not the folder that was published"),
    ],
)
async def test_the_model_before_goes_on_answering(pool, store, watch, old, model_id, changes, said) -> None:
    await publish(pool, published(store, model_id, **changes))
    assert await watch.refresh() == old
    assert said in watch.refused
    await publish(pool, old)
    assert await watch.refresh() == old
    assert watch.refused is None


async def test_what_cannot_answer_is_said_plainly(pool, store, stages, model_id) -> None:
    watch = LiveModelWatch(pool, store, stages.warm)
    with pytest.raises(ModelContractError, match="No model is published"):
        await watch.current()
    await publish(pool, published(store, model_id, embedding_space="no.space"))
    with pytest.raises(ModelContractError, match=r"has no space 'no\.space'"):
        await watch.current()


async def test_a_tampered_folder_does_not_take_over_until_it_is_mended(
    pool, store, stages, model_id, old
) -> None:
    broken = store / model_id / "model.onnx"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    watch = LiveModelWatch(pool, store, stages.warm)
    with pytest.raises(ModelContractError, match=r"model\.onnx is not the file its manifest names"):
        await watch.current()
    broken.write_bytes(whole)
    assert await watch.refresh() == old


async def test_requests_go_on_with_the_old_model_until_every_stage_has_the_new_one(
    pool, store, stages, watch, old, next_id
) -> None:
    new = published(store, next_id)
    stages.go.clear()
    async with running(watch):
        await publish(pool, new)
        await until(lambda: any(next_id in asked for asked in stages.asked))
        # Nobody waits for the one that is being loaded, and nobody gets it.
        async with asyncio.timeout(20):
            assert await watch.current() == old
        stages.broken = next_id
        stages.go.set()
        await until(lambda: watch.refused)
        assert "classifier cannot load" in watch.refused
        assert await watch.current() == old
        stages.broken = None
        await until(lambda: watch.refused is None)
        assert await watch.current() == new


async def test_a_stage_that_holds_another_folder_keeps_the_model_away(
    pool, store, stages, watch, old, next_id
) -> None:
    stages.store.open(next_id)
    manifest = store / next_id / MANIFEST_NAME
    manifest.write_text(manifest.read_text() + "\n")
    await publish(pool, published(store, next_id))
    assert await watch.refresh() == old
    assert f"holds another {next_id}" in watch.refused


async def test_a_candidate_is_ready_in_every_stage_before_the_row_flips(
    pool, store, stages, watch, old, model_id, next_id
) -> None:
    new = published(store, next_id)
    async with running(watch):
        await until(lambda: stages.asked == [(model_id,)])
        stages.broken = next_id
        with pytest.raises(Conflict, match=r"0 of 1 .* classifier cannot load"):
            await publish_when_ready(pool, new, within_s=6)
        assert await live_model(pool) == await watch.current() == old
        stages.broken = None
        await publish_when_ready(pool, new)
        assert (model_id, next_id) in stages.asked
        assert await live_model(pool) == new
        await until(lambda: stages.asked[-1] == (next_id,))
        assert await watch.current() == new
    assert await serving.announced(pool) is None
    assert await pool.fetchval("SELECT count(*) FROM serving_replicas") == 0


async def test_replicas_that_came_later_are_told_too(stages, watch, model_id, monkeypatch) -> None:
    monkeypatch.setattr("serve_app.lesions.live_model.TELL_AGAIN_AFTER_S", 0.0)
    async with running(watch):
        await until(lambda: len(stages.asked) >= 2)
    assert set(stages.asked) == {(model_id,)}


async def test_ready_says_which_model_was_refused(service) -> None:
    watch = service.app.state.services.live
    assert (await service.client.get("/readyz")).json()["refused_model"] is None
    row = await service.owner.fetchrow("SELECT model_id, model_digest, embedding_space FROM serving")
    await publish(service.owner, LiveModel("no_model.here", "0" * 64, "no.space"))
    try:
        await watch.refresh()
        response = await service.client.get("/readyz")
        assert response.status_code == 200
        assert response.json()["model_id"] == row["model_id"]
        assert "no_model.here" in response.json()["refused_model"]
        assert (await service.upload(await service.care())).status_code == 201
    finally:
        await publish(service.owner, LiveModel(*row))
        await watch.refresh()
