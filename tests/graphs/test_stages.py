"""Every stage as it runs in a replica: what it has in memory, and that nobody waits for a model but who asked for it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
import os
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from data_jobs.references.load import publish_bundled
from deployments.classifier.deployment import ClassifierDeployment
from deployments.cores import SharedCores
from deployments.embedder.deployment import EmbedderDeployment
from deployments.preprocess.decoder import Decoder
from deployments.preprocess.deployment import PreprocessDeployment
from deployments.retriever.deployment import RetrieverDeployment
from deployments.risk.deployment import RiskDeployment
from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore
from serve_app.domain.errors import ModelContractError
from serve_app.logs import ProcessLog
from serve_app.records.serving import LiveModel, live_model
from serve_app.settings import load_settings
from tests.model_folders import copy_model
from tests.pools import connected

STAGES = {
    "preprocess": (PreprocessDeployment, {}),
    "classifier": (ClassifierDeployment, {"threads": 1, "device": "cpu"}),
    "embedder": (EmbedderDeployment, {}),
    "retriever": (RetrieverDeployment, {}),
    "risk": (RiskDeployment, {"policy_version": "2026-11.4"}),
}


@pytest.fixture(scope="module")
def store(models: Path, model_id: str, tmp_path_factory) -> Path:
    """The shipped model, and the same one under another name."""
    folder = tmp_path_factory.mktemp("models")
    for tag in (None, "next"):
        copy_model(models / model_id, folder, tag)
    return folder


@pytest.fixture(scope="module")
async def served(new_database, store: Path, model_id: str):
    urls = await new_database()
    await publish_bundled(urls.owner, store, model_id)
    return urls


@pytest.fixture
async def start(served, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Start a stage as Serve does, without Serve."""
    settings = {"HOME": tmp_path, "MODELS": store, "DATABASE_URL": served.app, "TOKEN_SECRET": "x" * 40}
    for name, value in settings.items():
        monkeypatch.setenv(f"DERM_{name}", str(value))
    monkeypatch.setattr(ProcessLog, "install", lambda _: None)
    load_settings.cache_clear()

    closing = AsyncExitStack()

    async def started(name: str):
        deployment, arguments = STAGES[name]
        stage = deployment.func_or_class.__new__(deployment.func_or_class)
        await stage.__init__(**arguments)
        if name == "retriever":
            closing.push_async_callback(stage._references._pool.close)
        for value in vars(stage).values():
            if isinstance(value, SharedCores | Decoder):
                closing.callback(value.close)
        return stage

    async with closing:
        yield started
    load_settings.cache_clear()


@pytest.mark.parametrize("name", STAGES)
async def test_a_stage_has_what_it_is_told_to(served, store, start, name, model_id) -> None:
    async with connected(served.owner) as pool:
        live = await live_model(pool)
    assert live is not None
    (other,) = set(ModelStore(store)) - {model_id}
    candidate = LiveModel(other, ModelStore(store).open(other).digest, live.embedding_space)
    stage = await start(name)
    digests = await stage.warm((live, candidate))
    expected = {model.model_id: model.model_digest for model in (live, candidate)}
    assert digests == ({} if name == "retriever" else expected)
    if name != "retriever":
        with pytest.raises(ModelContractError, match="does not exist"):
            await stage.warm((live, LiveModel("not.here", "0" * 64, "no.space")))


@pytest.mark.parametrize("name", ["preprocess", "classifier", "embedder", "risk"])
async def test_a_model_that_is_not_in_memory_holds_up_nobody_else(start, store, name) -> None:
    """Its manifest is a pipe, so that verifying it takes until this test writes to that."""
    slow = store / "slow.one" / MANIFEST_NAME
    slow.parent.mkdir(exist_ok=True)
    slow.unlink(missing_ok=True)
    os.mkfifo(slow)
    stage = await start(name)
    call = {
        "preprocess": lambda: stage.prepare("slow.one", b""),
        "classifier": lambda: stage.classify("slow.one", np.zeros((8, 8, 3), np.uint8)),
        "embedder": lambda: stage.embed("slow.one", "slow.space", np.zeros(512, np.float32)),
        "risk": lambda: stage.conclude(LiveModel("slow.one", "", ""), None),
    }[name]
    went_on = Event()
    seen: list[bool] = []

    def write() -> None:
        seen.append(went_on.wait(10))
        slow.write_text("no manifest")

    writer = Thread(target=write)
    writer.start()
    asking = asyncio.create_task(call())
    await asyncio.sleep(0.2)
    went_on.set()
    with pytest.raises(ModelContractError):
        await asking
    writer.join()
    assert seen == [True], f"{name} held the event loop while it read a model"


@pytest.mark.parametrize(("name", "threads"), [("preprocess", "_cores"), ("classifier", "_passes")])
async def test_replicas_of_a_stage_share_the_cores(start, name, threads) -> None:
    cores = len(os.sched_getaffinity(0))
    first = await start(name)
    alone = getattr(first, threads).share()
    second = await start(name)
    for stage in (first, second):
        await stage.check_health()
    shares = [getattr(stage, threads)._jobs for stage in (first, second)]
    assert shares[0] == shares[1] <= max(1, cores // 2)
    assert shares[0] <= alone
