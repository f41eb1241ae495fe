"""The keyring or the key store is lost, another is in its place, or the provider is down: nothing goes on as if not."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace
import os
from pathlib import Path
import time

import asyncpg
from pydantic import SecretStr
import pytest

from cluster import cli
from data_jobs.references.load import publish_bundled
from serve_app.domain.errors import IntegrityError, KeyProviderUnavailable
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import retries
from serve_app.settings import NodeFiles
from tests.serve_app.erasure.erasing import path, uploaded
from tests.serve_app.keys.key_files import count_keys
from tests.serve_app.keys.key_services import KeyService, Vault


async def _works_again(service, patient: str, answer: dict) -> None:
    again = await service.upload(patient)
    assert again.status_code == 201
    for each in (answer, again.json()):
        read = await service.get(path(each))
        assert (read.status_code, read.content) == (200, service.image)


async def test_no_command_makes_a_keyring_in_a_lost_ones_place(
    service, settings, monkeypatch, capsys
) -> None:
    for name in [name for name in os.environ if name.startswith("DERM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DERM_HOME", str(settings.home))
    files, answer = NodeFiles(settings.home), await uploaded(service)
    away = files.keyring.with_suffix(".away")
    files.keyring.rename(away)
    try:
        for command in (["status"], ["rotate"], ["rewrap"], ["retire", "1"]):
            code = await asyncio.to_thread(cli.main, ["keys", "--home", str(files.home), *command])
            said = capsys.readouterr().err
            assert (code, said.count("\n")) == (1, 1), said
            assert "cannot be read (FileNotFoundError)" in said
            assert not files.keyring.exists()
        before = count_keys(files.keystore)
        async with service.storing_nothing(events=0):
            refused = await service.upload(answer["patient_id"])
        service.hold_to_problem(refused, 503, "key_provider_unavailable")
        assert count_keys(files.keystore) == before
    finally:
        away.rename(files.keyring)
    await _works_again(service, answer["patient_id"], answer)


@pytest.mark.parametrize("there", [False, True])
async def test_an_empty_key_store_beside_a_full_database_is_refused_at_start(
    service, start_service, tmp_path: Path, *, there: bool
) -> None:
    assert (await service.upload(await service.care())).status_code == 201
    lost = NodeFiles(tmp_path)
    if there:
        lost.keystore.parent.mkdir(mode=0o700)
        lost.keystore.touch(mode=0o600)
    with pytest.raises(IntegrityError, match="derm-cds restore --keys"):
        async with start_service(home=tmp_path):
            pass
    assert not lost.keyring.exists()
    assert lost.keystore.exists() == there


async def test_the_first_start_makes_both_and_no_later_one_nor_a_second_nodes_does(
    new_database, start_service, tmp_path: Path
) -> None:
    """A key store belongs to a database from the first start on: no image need be there yet."""
    urls, first, second = await new_database(), NodeFiles(tmp_path / "1"), NodeFiles(tmp_path / "2")
    url = SecretStr(urls.app)
    async with start_service(home=first.home, database_url=url):
        made = first.keyring.read_bytes()
    for used in (False, True):
        if used:  # the key store of another database
            with closing(KeyStore(second.keystore, FileKeyring.make(second.keyring))) as keys:
                keys.create()
        with pytest.raises(IntegrityError, match="belongs to another key store"):
            async with start_service(home=second.home, database_url=url):
                pass
        assert second.keystore.exists() == used
    async with start_service(home=first.home, database_url=url):
        assert first.keyring.read_bytes() == made
    first.keyring.unlink()
    with pytest.raises(KeyProviderUnavailable, match="cannot be read"):
        async with start_service(home=first.home, database_url=url):
            pass
    assert not first.keyring.exists()


async def test_a_key_store_that_knows_none_of_the_images_is_refused(service, start_service, tmp_path):
    """Of a database from before key stores were known to it, too."""
    assert (await service.upload(await service.care())).status_code == 201
    foreign = NodeFiles(tmp_path)
    with closing(KeyStore(foreign.keystore, FileKeyring.make(foreign.keyring))) as keys:
        keys.create()
    claim = await service.owner.fetchrow("DELETE FROM key_stores RETURNING *")
    try:
        with pytest.raises(IntegrityError, match="none of them opens"):
            async with start_service(home=tmp_path):
                pass
        assert await service.owner.fetchval("SELECT count(*) FROM key_stores") == 0
    finally:
        await service.owner.execute("INSERT INTO key_stores VALUES ($1, $2, $3)", *claim)


async def test_a_vault_that_is_down_is_a_problem_with_a_time_to_return(
    new_database, models, model_id, start_service, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retries, "_REST_S", 0.05)
    vault = Vault()
    vault.make_key("derm")
    transit, urls = KeyService(vault), await new_database()  # one of this node's own, as its keys are
    await publish_bundled(urls.owner, models, model_id)
    changed = {
        "home": tmp_path,
        "database_url": SecretStr(urls.app),
        "key_provider": f"vault+http://127.0.0.1:{transit.port}/transit/derm",
        "vault_token": SecretStr(vault.token),
    }
    async with start_service(**changed) as started, asyncpg.create_pool(urls.owner) as owner:
        service = replace(started, owner=owner)
        answer = await uploaded(service)
        patient = answer["patient_id"]
        transit.down()
        for response in (await service.upload(patient), await service.get(path(answer))):
            body = service.hold_to_problem(response, 503, "key_provider_unavailable")
            assert response.headers["retry-after"] == "5"
            assert "s.right" not in response.text
            assert "try again" in body["detail"]
        assert await service.owner.fetchval("SELECT count(*) FROM lesion_images") == 1
        transit.up()
        time.sleep(0.06)  # noqa: ASYNC251 - nothing else runs
        await _works_again(service, patient, answer)
    transit.down()
