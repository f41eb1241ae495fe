"""The key provider goes away, and comes back: nothing is stored meanwhile, nothing is opened, and each caller knows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
import time

from pydantic import SecretStr
import pytest

from data_jobs.references.load import publish_bundled
from serve_app.keys.providers import retries
from serve_app.records.pool import Pool, open_pool
from tests.serve_app.keys.key_service import KeyService
from tests.serve_app.keys.vault_server import Vault


@asynccontextmanager
async def own_pool(dsn: str) -> AsyncIterator[Pool]:
    pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=20)
    yield pool
    await pool.close()


async def test_a_vault_that_is_down_is_a_problem_with_a_time_to_return(
    new_database, models, model_id, start_service, local_stages, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retries, "_REST_S", 0.05)
    vault = Vault()
    vault.make_key("derm")
    transit = KeyService(vault)
    urls = await new_database()  # one of this node's own, as its keys are
    await publish_bundled(urls.owner, models, model_id)
    changed = {
        "home": tmp_path,
        "database_url": SecretStr(urls.app),
        "key_provider": f"vault+http://127.0.0.1:{transit.port}/transit/derm",
        "vault_token": SecretStr(vault.token),
    }
    async with start_service(local_stages(), **changed) as started, own_pool(urls.owner) as owner:
        service = replace(started, owner=owner)
        patient = await service.care()
        answer = (await service.upload(patient)).json()
        images = await service.owner.fetchval("SELECT count(*) FROM lesion_images")
        image_id = answer["image_id"]
        path = f"/api/lesions/{answer['lesion_id']}/images/{image_id}"
        transit.down()
        for response in (
            await service.upload(patient),
            await service.client.get(path, headers=service.token("dr")),
        ):
            body = service.hold_to_problem(response, 503, "key_provider_unavailable")
            assert response.headers["retry-after"] == "5"
            assert "s.right" not in response.text
            assert "try again" in body["detail"]
        assert await service.owner.fetchval("SELECT count(*) FROM lesion_images") == images
        transit.up()
        time.sleep(0.06)  # noqa: ASYNC251 - nothing else runs
        assert (await service.client.get(path, headers=service.token("dr"))).content == service.image
        assert (await service.upload(patient)).status_code == 201
    transit.down()
