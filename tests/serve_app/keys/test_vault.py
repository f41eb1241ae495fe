"""What is Vault's own: versions, its token, its address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from serve_app.domain.errors import Conflict, IntegrityError, InvalidSetting, KeyProviderUnavailable, NotFound
from serve_app.keys.envelope import seal
from serve_app.keys.keyring import KeyProvider, WrappedKey
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider, retries
from serve_app.keys.providers.vault import VaultAddress, VaultTransit
from serve_app.settings import KeySettings
from tests.serve_app.keys.key_files import BINDING
from tests.serve_app.keys.key_service import KeyService
from tests.serve_app.keys.vault_server import Vault


@pytest.fixture
def transit() -> Vault:
    made = Vault()
    made.make_key("derm")
    return made


@pytest.fixture
def service(transit: Vault, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyService]:
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
    running = KeyService(transit)
    yield running
    running.down()


@pytest.fixture
def settings(service: KeyService, transit: Vault, tmp_path: Path) -> KeySettings:
    (tmp_path / "token").write_text(transit.token)
    url = f"vault+http://127.0.0.1:{service.port}/transit/derm"
    return KeySettings(home=tmp_path, key_provider=url, vault_token_file=tmp_path / "token")


@pytest.fixture
def provider(settings: KeySettings) -> KeyProvider:
    return open_key_provider(settings)


def test_images_stay_readable_while_a_key_rotates_and_retires(provider: KeyProvider, keys: Path) -> None:
    with closing(KeyStore(keys / "keystore.sqlite", provider)) as store:
        images = [seal(b"%d" % n, data_key=store.create(), binding=BINDING) for n in range(5)]
        assert provider.rotate() == provider.current_version == 2
        assert store.rewrap(3) == 3
        assert [store.open_image(image, BINDING) for image in images] == [b"%d" % n for n in range(5)]
        assert store.rewrap() == 2
        with pytest.raises(Conflict, match="rotate and rewrap first"):
            provider.retire(2)
        with pytest.raises(NotFound, match="no version 7"):
            provider.retire(7)
        provider.retire(1)
        assert provider.versions == (2,)
        assert [store.open_image(image, BINDING) for image in images] == [b"%d" % n for n in range(5)]


def test_a_version_is_the_ciphertexts_and_lost_when_it_is_retired(
    provider: KeyProvider, transit: Vault
) -> None:
    key_id = uuid4()
    wrapped = provider.wrap(bytes(32), key_id)
    provider.rotate()
    relabelled = wrapped.wrapped.replace(b"vault:v1:", b"vault:v2:")
    with pytest.raises(IntegrityError):
        provider.unwrap(WrappedKey(relabelled, 2), key_id)
    provider.rotate()
    with pytest.raises(Conflict, match="retire 1 before 2"):
        provider.retire(2)
    provider.retire(1)
    assert list(transit.keys["derm"]["versions"]) == [2, 3]
    with pytest.raises(IntegrityError):
        provider.unwrap(wrapped, key_id)


def test_a_renewed_token_is_used_at_once(
    provider: KeyProvider, settings: KeySettings, transit: Vault
) -> None:
    transit.token = "s.renewed"
    with pytest.raises(KeyProviderUnavailable, match=r"token .* \(403\)"):
        provider.wrap(bytes(32), uuid4())
    assert settings.vault_token_file is not None
    settings.vault_token_file.write_text("s.renewed\n")
    provider.wrap(bytes(32), uuid4())
    settings.vault_token_file.unlink()
    with pytest.raises(KeyProviderUnavailable, match="cannot be read"):
        provider.wrap(bytes(32), uuid4())


def test_a_token_may_come_from_the_environment(
    settings: KeySettings, transit: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAULT_TOKEN", transit.token)
    again = KeySettings(home=settings.home, key_provider=settings.key_provider)
    assert transit.token not in repr(again)
    assert open_key_provider(again).current_version == 1
    monkeypatch.delenv("VAULT_TOKEN")
    with pytest.raises(KeyProviderUnavailable, match="DERM_VAULT_TOKEN_FILE"):
        open_key_provider(KeySettings(home=settings.home, key_provider=settings.key_provider))


def test_a_key_that_cannot_bind_or_is_not_there_is_refused(settings: KeySettings, transit: Vault) -> None:
    transit.make_key("derm", kind="rsa-4096")
    with pytest.raises(InvalidSetting, match="aes256-gcm96"):
        open_key_provider(settings)
    transit.keys.clear()
    with pytest.raises(KeyProviderUnavailable, match="no such transit key"):
        open_key_provider(settings)


def test_a_redirect_is_not_followed(provider: KeyProvider, service: KeyService) -> None:
    service.faults = [307] * 3
    with pytest.raises(KeyProviderUnavailable, match="HTTP 307"):
        provider.wrap(bytes(32), uuid4())


@pytest.mark.parametrize(
    ("text", "url", "mount", "key"),
    [
        ("vault://vault.example:8201/transit/derm", "https://vault.example:8201", "transit", "derm"),
        ("vault://vault.example/a/b/transit/derm/", "https://vault.example:8200", "a/b/transit", "derm"),
        ("vault+http://localhost:8100/t/k", "http://localhost:8100", "t", "k"),
        ("vault+http://[::1]/t/k", "http://[::1]:8200", "t", "k"),
        ("vault://h/t/k?namespace=clinic", "https://h:8200", "t", "k"),
    ],
)
def test_an_address_is_read(text: str, url: str, mount: str, key: str) -> None:
    namespace = "clinic" if "namespace" in text else None
    assert VaultAddress.parse(text) == VaultAddress(url, mount, key, namespace)


@pytest.mark.parametrize(
    "text",
    [
        "vault://",
        "vault://host/derm",
        "vault://host:port/transit/derm",
        "vault://token@host/transit/derm",
        "vault+http://10.0.0.1/transit/derm",
    ],
)
def test_another_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting):
        VaultAddress.parse(text)


@pytest.mark.parametrize("text", ["", "keyring.json", "s3:bucket", "kms:"])
def test_an_unknown_provider_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="none of file:"):
        open_key_provider(KeySettings(home=tmp_path, key_provider=text))


def test_a_plain_name_server_is_verified(transit: Vault, service: KeyService) -> None:
    """HTTPS is never given up: a server that speaks plain HTTP there is one that does not answer."""
    address = VaultAddress.parse(f"vault://127.0.0.1:{service.port}/transit/derm")
    with pytest.raises(KeyProviderUnavailable, match="SSLError"):
        VaultTransit(address, lambda: transit.token)
    assert service.requests == 0


def test_the_file_keyring_is_the_default_and_may_lie_elsewhere(tmp_path: Path) -> None:
    said = str(open_key_provider(KeySettings(home=tmp_path), first_start=True))
    assert str(tmp_path / "keys" / "keyring.json") in said
    elsewhere = tmp_path / "stick" / "keyring.json"
    open_key_provider(KeySettings(home=tmp_path, key_provider=f"file:{elsewhere}"), first_start=True)
    assert elsewhere.exists()
