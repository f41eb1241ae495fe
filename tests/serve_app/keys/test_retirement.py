"""A retired key-encryption key takes no image with it: not one that was being wrapped, not one of another key store."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable
from contextlib import closing
import os
from pathlib import Path

import asyncpg
from pydantic import SecretStr
import pytest

from cluster import cli
from data_jobs.references.load import publish_bundled
from serve_app.domain.errors import Conflict, KeyProviderUnavailable
from serve_app.keys.envelope import seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.settings import NodeFiles, load_key_settings
from tests.serve_app.conftest import Service
from tests.serve_app.erasure.erasing import path
from tests.serve_app.keys.key_files import BINDING, count_keys, sqlite
from tests.serve_app.keys.key_services import KeyService, Vault


@pytest.fixture
def stall(monkeypatch) -> Callable[[KeyStore, Callable[[], None]], None]:
    """Have something happen between the next wrap of a store and the writing of what it wrapped."""

    def until(store: KeyStore, meanwhile: Callable[[], None]) -> None:
        wrap = store.checks.wrap

        def wrap_and_wait(*of: object):
            wrapped = wrap(*of)
            monkeypatch.setattr(store.checks, "wrap", wrap)
            meanwhile()
            return wrapped

        monkeypatch.setattr(store.checks, "wrap", wrap_and_wait)

    return until


@pytest.fixture
def keys_command(new_database, monkeypatch) -> Callable[..., int]:
    """Run `derm-cds keys` on a home; its exit code."""
    for name in [name for name in os.environ if name.startswith("DERM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DERM_HOME", "")  # put back afterwards, for the command sets it

    def run(home: Path, *arguments: str) -> int:
        return cli.main(["keys", "--home", str(home), *arguments])

    return run


async def test_an_upload_that_stalls_while_its_key_version_is_retired_is_kept(
    new_database, start_service, models, model_id, tmp_path: Path, keys_command, stall, monkeypatch
) -> None:
    """Wrapped, then rotated, rewrapped and retired by an operator, then stored: a 201 is an image that opens."""
    urls, home = await new_database(), tmp_path / "home"
    await publish_bundled(urls.owner, models, model_id)
    monkeypatch.setenv("DERM_DATABASE_URL", urls.app)
    changed = {"home": home, "database_url": SecretStr(urls.app)}

    def retire() -> None:
        for command in (["rotate"], ["rewrap"], ["retire", "1"]):
            assert keys_command(home, *command) == 0

    async with start_service(**changed) as started, asyncpg.create_pool(urls.owner) as owner:
        service = Service(started.app, started.client, owner, started.image, started.document)
        stall(service.app.state.services.keys, retire)
        answer = await service.upload(await service.care())
        assert answer.status_code == 201, answer.text
        read = await service.get(path(answer.json()))
        assert (read.status_code, read.content) == (200, service.image)
    assert FileKeyring(NodeFiles(home).keyring).versions == (2,)
    async with start_service(**changed) as service:  # and the node starts again
        assert (await service.get(path(answer.json()))).content == service.image


def test_rewrapping_under_a_version_that_is_retired_meanwhile_loses_nothing(
    store: KeyStore, keyring: FileKeyring, keys: Path, stall
) -> None:
    images = [seal(b"image", data_key=store.create(), binding=BINDING) for _ in range(3)]
    keyring.rotate()

    def retire() -> None:  # nothing is under version 2 yet, for all that the store can see
        keyring.rotate()
        store.retire(2)
        keyring.retire(2)

    stall(store, retire)
    assert store.rewrap() == 3
    assert [store.open_image(sealed, BINDING) for sealed in images] == [b"image"] * 3
    assert sqlite(keys / "keystore.sqlite", "SELECT DISTINCT key_version FROM data_keys") == [(3,)]
    KeyStore(keys / "keystore.sqlite", FileKeyring(keys / "keyring.json")).close()


def test_a_version_that_wraps_a_data_key_is_not_retired_and_a_retired_one_is_refused(
    store: KeyStore, keyring: FileKeyring, keys: Path, stall
) -> None:
    store.create()
    with pytest.raises(Conflict, match="Version 1 wraps 1 data keys in"):
        store.retire(1)
    keyring.rotate()
    store.rewrap()
    for _ in range(2):  # cut off in between, it is repeated
        store.retire(1)
    store.retire(2 * 10**9)
    keyring.rotate()
    before = count_keys(keys / "keystore.sqlite")
    # Whoever still wraps under a retired version, as no provider of ours does, stores nothing.
    sqlite(keys / "keystore.sqlite", "INSERT INTO retired_versions (key_version) VALUES (3)")
    with pytest.raises(KeyProviderUnavailable, match="nothing was stored") as raised:
        store.create()
    assert (raised.value.status, raised.value.code) == (503, "key_provider_unavailable")
    with pytest.raises(KeyProviderUnavailable, match="nothing was stored"):
        store.rewrap()
    assert count_keys(keys / "keystore.sqlite") == before


@pytest.fixture
async def two_homes(new_database, tmp_path: Path, keys_command, monkeypatch) -> list[Path]:
    """Two nodes under one keyring."""
    urls = await new_database()
    for name, value in (
        ("DATABASE_URL", urls.app),
        ("OWNER_DATABASE_URL", urls.owner),
        ("KEY_PROVIDER", f"file:{tmp_path / 'shared' / 'keyring.json'}"),
    ):
        monkeypatch.setenv(f"DERM_{name}", value)
    return [tmp_path / "here", tmp_path / "there"]


def test_a_keyring_of_two_key_stores_is_counted_in_both(two_homes, keys_command, tmp_path, stall, capsys):
    here, there = two_homes
    keyring = FileKeyring.make(tmp_path / "shared" / "keyring.json")

    def said(home: Path, *arguments: str) -> str:
        assert keys_command(home, *arguments) == 1
        return capsys.readouterr().err

    with (
        closing(KeyStore(NodeFiles(here).keystore, keyring)),
        closing(
            KeyStore(NodeFiles(there).keystore, FileKeyring(tmp_path / "shared" / "keyring.json"))
        ) as other,
    ):
        sealed = seal(b"image", data_key=other.create(), binding=BINDING)
        for command in ("rotate", "rewrap"):
            assert keys_command(here, command) == 0
        assert f"1 data keys in {NodeFiles(there).keystore}" in said(here, "retire", "1")
        assert keyring.versions == (1, 2)
        away = NodeFiles(there).keystore.parent.rename(tmp_path / "away")
        assert "--alone" in said(here, "retire", "1")  # not to be looked at: not retired, either
        assert keyring.versions == (1, 2)
        away.rename(NodeFiles(there).keystore.parent)
        assert keys_command(there, "rewrap") == 0
        # An upload to the other one that stalls now is wrapped anew, too.
        stall(other, lambda: keys_command(here, "rotate") + keys_command(there, "rewrap") or None)
        assert keys_command(here, "rewrap") == keys_command(here, "retire", "1") == 0
        stalled = seal(b"late", data_key=other.create(), binding=BINDING)
        assert keyring.versions == (2, 3)
        assert [other.open_image(each, BINDING) for each in (sealed, stalled)] == [b"image", b"late"]
        assert f"also wraps for {NodeFiles(there).keystore}" in _out(keys_command, here, capsys)


async def test_a_key_of_vault_is_retired_once_somebody_says_whose_it_is(
    two_homes, keys_command, monkeypatch, capsys
) -> None:
    here, _ = two_homes
    vault = Vault()
    vault.make_key("derm")
    service = KeyService(vault)
    monkeypatch.setenv("DERM_KEY_PROVIDER", f"vault+http://127.0.0.1:{service.port}/transit/derm")
    monkeypatch.setenv("VAULT_TOKEN", vault.token)
    provider, (mine, theirs) = open_key_provider(load_key_settings()), map(_keystore, two_homes)

    def retire(*options: str) -> tuple[int, str]:
        return keys_command(here, "retire", "1", *options), capsys.readouterr().err

    try:
        with closing(KeyStore(mine, provider)), closing(KeyStore(theirs, provider)) as other:
            key = other.create()
            assert await to_thread(keys_command, here, "rotate") == 0
            code, said = await to_thread(retire)
            assert (code, "name every other key store with --also, or say --alone" in said) == (1, True)
            code, said = await to_thread(retire, "--also", str(theirs))
            assert (code, f"1 data keys in {theirs}" in said) == (1, True)
            assert vault.keys["derm"]["versions"].keys() == {1, 2}
            other.rewrap()
            assert await to_thread(retire, "--also", str(theirs)) == (0, "")
            assert vault.keys["derm"]["versions"].keys() == {2}
            assert other.load(key.id).id == key.id
    finally:
        service.down()


def _keystore(home: Path) -> Path:
    return NodeFiles(home).keystore


def _out(keys_command, home: Path, capsys) -> str:
    assert keys_command(home, "status") == 0
    return capsys.readouterr().out
