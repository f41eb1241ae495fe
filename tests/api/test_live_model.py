"""A published model that is not whole here does not take over, and the service says so."""

from __future__ import annotations

from pathlib import Path
import shutil

import pytest

from model_store.registry import ModelStore
from serve_app.api.live_model import LiveModelWatch
from serve_app.domain.errors import ModelContractError
from serve_app.records.pool import open_pool
from serve_app.records.serving import LiveModel, publish


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


def published(store: Path, shipped: str, **changes: str) -> LiveModel:
    model = ModelStore(store).open(shipped)
    values = {
        "model_id": shipped,
        "model_digest": model.digest,
        "embedding_space": model.manifest.live_space.embedding_space,
    }
    return LiveModel(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_id": "no_model.here"}, "does not exist"),
        ({"model_digest": "0" * 64}, "is not the folder that was published"),
    ],
)
async def test_the_model_before_goes_on_answering(pool, store, model_id, changes, said) -> None:
    good = published(store, model_id)
    watch = LiveModelWatch(pool, store)
    await publish(pool, good)
    assert await watch.current() == good
    await publish(pool, published(store, model_id, **changes))
    assert await watch.refresh() == good
    assert said in watch.refused
    await publish(pool, good)
    assert await watch.refresh() == good
    assert watch.refused is None


async def test_a_space_that_the_model_does_not_have_is_refused(pool, store, model_id) -> None:
    await publish(pool, published(store, model_id, embedding_space="no.space"))
    with pytest.raises(ModelContractError, match=r"has no space 'no\.space'"):
        await LiveModelWatch(pool, store).current()


async def test_a_tampered_folder_does_not_take_over_until_it_is_mended(pool, store, model_id, models) -> None:
    good = published(store, model_id)
    broken = store / model_id / "model.onnx"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    watch = LiveModelWatch(pool, store)
    await publish(pool, good)
    with pytest.raises(ModelContractError, match=r"model\.onnx is not the file its manifest names"):
        await watch.current()
    broken.write_bytes(whole)
    assert await watch.refresh() == good


async def test_nothing_published_is_said_plainly(pool, store) -> None:
    with pytest.raises(ModelContractError, match="No model is published"):
        await LiveModelWatch(pool, store).current()


async def test_ready_says_which_model_was_refused(service) -> None:
    watch = service.app.state.services.live
    assert (await service.client.get("/readyz")).json()["refused_model"] is None
    row = await service.owner.fetchrow("SELECT model_id, model_digest, embedding_space FROM serving")
    await publish(service.owner, LiveModel("no_model.here", "0" * 64, "no.space"))
    try:
        response = await service.client.get("/readyz")
        assert response.status_code == 200
        assert response.json()["model_id"] == row["model_id"]
        assert "no_model.here" in response.json()["refused_model"]
        assert (await service.upload(await service.care())).status_code == 201
    finally:
        await publish(service.owner, LiveModel(*row))
        await watch.refresh()
