"""The key provider goes away, and comes back: nothing is stored meanwhile, nothing is opened, and each caller knows."""

from __future__ import annotations

from contextlib import closing
import time

from pydantic import SecretStr
import pytest

from benchmarks.key_service import KeyService
from benchmarks.vault_server import Vault
from serve_app.security.key_providers import attempts
from serve_app.security.key_providers.choice import open_key_provider
from serve_app.security.keystore import KeyStore


async def test_a_vault_that_is_down_is_a_problem_with_a_time_to_return(
    settings, start_service, local_stages, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(attempts, "_REST_S", 0.05)
    vault = Vault()
    vault.make_key("derm")
    transit = KeyService(vault)
    changed = {
        "home": tmp_path,
        "key_provider": f"vault+http://127.0.0.1:{transit.port}/transit/derm",
        "vault_token": SecretStr(vault.token),
    }
    # The database is every test's, and has their images: this node has been used before, too.
    used = settings.model_copy(update=changed)
    with closing(KeyStore(used.files.keystore, open_key_provider(used))) as keys:
        keys.create()
    async with start_service(local_stages(), **changed) as service:
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
