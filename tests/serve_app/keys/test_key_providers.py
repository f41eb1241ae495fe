"""Vault and KMS through their real clients, over HTTP, against their API: what holds of both, then of each."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
import logging
import os
from pathlib import Path
import time
import traceback
from typing import Any
from uuid import uuid4

import pytest

from serve_app.domain.errors import Conflict, IntegrityError, InvalidSetting, KeyProviderUnavailable, NotFound
from serve_app.keys.envelope import seal
from serve_app.keys.keyring import KeyProvider, WrappedKey
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import kms, open_key_provider, retries, vault
from serve_app.keys.providers.kms import AwsKms
from serve_app.keys.providers.vault import VaultAddress, VaultTransit
from serve_app.settings import KeySettings
from tests.serve_app.keys.key_files import BINDING
from tests.serve_app.keys.key_services import KeyService, Kms, Vault

KEY = bytes(range(32))
ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd"


@dataclass(frozen=True)
class Remote:
    """A provider, how it was opened, and the service behind it: its HTTP server and what that answers from."""

    provider: KeyProvider
    settings: KeySettings
    service: KeyService
    backend: Any

    def again(self) -> KeyProvider:
        return open_key_provider(self.settings)


@contextmanager
def _opened(kind: str, home: Path) -> Iterator[Remote]:
    """A provider with time-outs that suit a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "_FIRST_WAIT_S", 0.01)
        patch.setattr(retries, "_REST_S", 0.05)
        for module in (vault, kms):
            patch.setattr(module, "READ_TIMEOUT_S", 0.3)
        patch.setenv("NO_PROXY", "*")
        backend = Kms() if kind == "kms" else Vault()
        service = KeyService(backend)
        if isinstance(backend, Kms):
            backend.make_key("1234abcd", alias="alias/derm")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
                patch.setenv(name, "true")
            patch.setenv("AWS_REGION", "eu-central-1")
            patch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{service.port}")
            settings = KeySettings(home=home, key_provider="kms:alias/derm")
        else:
            backend.make_key("derm", derived=kind == "vault-derived")
            (home / "token").write_text(f"{backend.token}\n")
            url = f"vault+http://127.0.0.1:{service.port}/transit/derm"
            settings = KeySettings(home=home, key_provider=url, vault_token_file=home / "token")
        yield Remote(open_key_provider(settings), settings, service, backend)
        service.down()


@pytest.fixture(scope="module", params=["vault", "vault-derived", "kms"])
def opened(request, tmp_path_factory) -> Iterator[Remote]:
    with _opened(request.param, tmp_path_factory.mktemp("home")) as remote:
        yield remote


@pytest.fixture
def remote(opened: Remote) -> Remote:
    """As it was opened: nothing is forbidden, nothing in trouble, and nobody rests."""
    opened.backend.forbidden.clear()
    opened.service.faults = []
    opened.provider._retries._rests_until = 0.0
    return opened


@pytest.fixture
def transit(tmp_path: Path) -> Iterator[Remote]:
    """A Vault of the test's own."""
    with _opened("vault", tmp_path) as remote:
        yield remote


#: For what is KMS's own.
of_kms = pytest.mark.parametrize("opened", ["kms"], indirect=True)


def test_a_key_wrapped_is_a_key_unwrapped(remote: Remote) -> None:
    key_id = uuid4()
    first, second = remote.provider.wrap(KEY, key_id), remote.provider.wrap(KEY, key_id)
    assert first.wrapped != second.wrapped
    assert KEY not in first.wrapped
    assert first.key_version == remote.provider.current_version == 1
    assert remote.provider.versions == (1,)
    assert remote.provider.unwrap(first, key_id) == remote.again().unwrap(second, key_id) == KEY


def test_a_wrapped_key_altered_cut_relabelled_or_anothers_is_refused(remote: Remote) -> None:
    key_id = uuid4()
    good = remote.provider.wrap(KEY, key_id)
    flipped = bytearray(good.wrapped)
    flipped[-6] = ord("A") if flipped[-6] != ord("A") else ord("B")
    for wrapped in (bytes(flipped), good.wrapped[:-4], b"", b"vault:v1:", os.urandom(60)):
        with pytest.raises(IntegrityError):
            remote.provider.unwrap(WrappedKey(wrapped, 1), key_id)
    with pytest.raises(IntegrityError):
        remote.provider.unwrap(good, uuid4())
    for version in (0, 2):
        with pytest.raises(IntegrityError):
            remote.provider.unwrap(WrappedKey(good.wrapped, version), key_id)


def test_a_key_store_works_on_it_and_stores_nothing_when_it_fails(remote: Remote, keys: Path) -> None:
    with closing(KeyStore(keys / "keystore.sqlite", remote.provider)) as store:
        sealed = seal(b"image", data_key=store.create(), binding=BINDING)
    with closing(KeyStore(keys / "keystore.sqlite", remote.again())) as store:
        assert store.open_image(sealed, BINDING) == b"image"
        assert store.rewrap() == 0
        remote.service.faults = [503] * 3
        with pytest.raises(KeyProviderUnavailable):
            store.create()
        assert [count.data_keys for count in store.count_versions()] == [1]


def test_no_wrapped_key_is_cached_and_a_refusal_not_repeated(remote: Remote) -> None:
    """Every open asks the service, once: what it revokes is revoked at once."""
    key_id = uuid4()
    wrapped = remote.provider.wrap(KEY, key_id)
    remote.provider.unwrap(wrapped, key_id)
    before = remote.service.requests
    remote.provider.unwrap(wrapped, key_id)
    assert remote.service.requests == before + 1
    remote.backend.forbidden.update(("decrypt", "Decrypt"))
    with pytest.raises(KeyProviderUnavailable, match="refuses"):
        remote.provider.unwrap(wrapped, key_id)
    assert remote.service.requests == before + 2


@pytest.mark.parametrize("fault", [502, 1.0])
def test_trouble_that_passes_is_waited_out(remote: Remote, fault: float) -> None:
    before = remote.service.requests
    remote.service.faults = [fault, fault]
    assert remote.provider.wrap(KEY, uuid4()).key_version == 1
    assert remote.service.requests == before + 3


@pytest.mark.parametrize("fault", [500, 1.0])
def test_trouble_that_stays_is_a_typed_error(remote: Remote, fault: float) -> None:
    remote.service.faults = [fault] * 3
    started = time.monotonic()
    with pytest.raises(KeyProviderUnavailable, match="does not answer") as raised:
        remote.provider.wrap(KEY, uuid4())
    assert time.monotonic() - started < 3
    error = raised.value
    assert (error.status, error.code, error.retry_after_s) == (503, "key_provider_unavailable", 5)


def test_a_service_that_is_down_turns_callers_away_at_once_and_is_found_again(remote: Remote) -> None:
    key_id = uuid4()
    wrapped = remote.provider.wrap(KEY, key_id)
    remote.service.down()
    with pytest.raises(KeyProviderUnavailable, match="does not answer"):
        remote.provider.unwrap(wrapped, key_id)
    started = time.monotonic()
    with pytest.raises(KeyProviderUnavailable, match="has just failed"):
        remote.provider.unwrap(wrapped, key_id)
    assert time.monotonic() - started < 0.02
    with pytest.raises(KeyProviderUnavailable):
        remote.again()
    remote.service.up()
    time.sleep(0.06)
    assert remote.provider.unwrap(wrapped, key_id) == KEY


def test_no_key_is_logged_or_quoted(remote: Remote, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key, key_id = os.urandom(32), uuid4()
    remote.provider.unwrap(remote.provider.wrap(key, key_id), key_id)
    remote.service.faults = [500] * 3
    with pytest.raises(KeyProviderUnavailable) as raised:
        remote.provider.wrap(key, key_id)
    said = caplog.text + "".join(traceback.format_exception(raised.value)) + str(remote.provider)
    for secret in (key.hex(), b64encode(key).decode(), repr(key), "s.right"):
        assert secret not in said
    # Neither does the error hold the request: a collector of errors may print what it holds.
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_images_stay_readable_while_a_key_of_vault_rotates_and_retires(transit: Remote, keys: Path) -> None:
    provider = transit.provider
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


def test_a_version_is_the_ciphertexts_and_lost_when_it_is_retired(transit: Remote) -> None:
    provider, key_id = transit.provider, uuid4()
    wrapped = provider.wrap(KEY, key_id)
    provider.rotate()
    relabelled = wrapped.wrapped.replace(b"vault:v1:", b"vault:v2:")
    with pytest.raises(IntegrityError):
        provider.unwrap(WrappedKey(relabelled, 2), key_id)
    provider.rotate()
    with pytest.raises(Conflict, match="retire 1 before 2"):
        provider.retire(2)
    provider.retire(1)
    assert list(transit.backend.keys["derm"]["versions"]) == [2, 3]
    with pytest.raises(IntegrityError):
        provider.unwrap(wrapped, key_id)


def test_a_renewed_token_is_used_at_once(transit: Remote) -> None:
    provider, file = transit.provider, transit.settings.vault_token_file
    transit.backend.token = "s.renewed"
    with pytest.raises(KeyProviderUnavailable, match=r"token .* \(403\)"):
        provider.wrap(KEY, uuid4())
    file.write_text("s.renewed\n")
    provider.wrap(KEY, uuid4())
    file.unlink()
    with pytest.raises(KeyProviderUnavailable, match="cannot be read"):
        provider.wrap(KEY, uuid4())


def test_a_token_may_come_from_the_environment(transit: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {"home": transit.settings.home, "key_provider": transit.settings.key_provider}
    with pytest.raises(KeyProviderUnavailable, match="DERM_VAULT_TOKEN_FILE"):
        open_key_provider(KeySettings(**changed))
    monkeypatch.setenv("VAULT_TOKEN", transit.backend.token)
    settings = KeySettings(**changed)
    assert transit.backend.token not in repr(settings)
    assert open_key_provider(settings).current_version == 1


def test_a_key_of_vault_that_cannot_bind_or_is_not_there_is_refused(transit: Remote) -> None:
    transit.backend.make_key("derm", kind="rsa-4096")
    with pytest.raises(InvalidSetting, match="aes256-gcm96"):
        transit.again()
    transit.backend.keys.clear()
    with pytest.raises(KeyProviderUnavailable, match="no such transit key"):
        transit.again()


def test_no_redirect_is_followed_and_no_plain_server_asked_for_https(transit: Remote) -> None:
    transit.service.faults = [307] * 3
    with pytest.raises(KeyProviderUnavailable, match="HTTP 307"):
        transit.provider.wrap(KEY, uuid4())
    before = transit.service.requests
    address = VaultAddress.parse(f"vault://127.0.0.1:{transit.service.port}/transit/derm")
    with pytest.raises(KeyProviderUnavailable, match="SSLError"):
        VaultTransit(address, lambda: transit.backend.token)
    assert transit.service.requests == before


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


_ADDRESS = ("", "host/derm", "host:port/transit/derm", "token@host/transit/derm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((f"vault://{address}", "is not vault://HOST") for address in _ADDRESS),
        ("vault+http://10.0.0.1/transit/derm", "this machine only"),
        *((text, "none of file:") for text in ("", "keyring.json", "s3:bucket", "kms:")),
    ],
)
def test_another_address_or_provider_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=message):
        open_key_provider(KeySettings(home=tmp_path, key_provider=text))


def test_the_file_keyring_is_the_default_and_may_lie_elsewhere(tmp_path: Path) -> None:
    said = str(open_key_provider(KeySettings(home=tmp_path), first_start=True))
    assert str(tmp_path / "keys" / "keyring.json") in said
    elsewhere = tmp_path / "stick" / "keyring.json"
    open_key_provider(KeySettings(home=tmp_path, key_provider=f"file:{elsewhere}"), first_start=True)
    assert elsewhere.exists()


@of_kms
def test_the_region_is_the_arns_and_needed(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    key_id = uuid4()
    AwsKms(ARN).wrap(KEY, key_id)
    last = remote.backend.seen[-1]
    assert "/eu-central-1/kms/" in last["headers"]["Authorization"]
    assert last["headers"]["X-Amz-Target"] == "TrentService.Encrypt"
    assert last["body"]["EncryptionContext"] == {"derm-cds:data-key-id": str(key_id)}
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidSetting, match="region"):
        AwsKms("alias/derm")


@of_kms
def test_another_key_of_kms_is_refused(remote: Remote) -> None:
    remote.backend.make_key("other")
    remote.backend.make_key("rsa", spec="RSA_2048")
    key_id = uuid4()
    wrapped = AwsKms(ARN.replace("1234abcd", "other")).wrap(KEY, key_id)
    with pytest.raises(IntegrityError):
        remote.provider.unwrap(wrapped, key_id)
    with pytest.raises(InvalidSetting, match="SYMMETRIC_DEFAULT"):
        AwsKms(ARN.replace("1234abcd", "rsa"))
    with pytest.raises(KeyProviderUnavailable, match="NotFoundException"):
        AwsKms(ARN.replace("1234abcd", "nobody"))


@of_kms
def test_throttling_is_waited_out_and_a_disabled_key_unavailable(remote: Remote, monkeypatch) -> None:
    remote.service.faults = [400, 400]  # KMS throttles with 400
    remote.provider.wrap(KEY, uuid4())
    monkeypatch.setitem(remote.backend.keys["1234abcd"], "enabled", False)  # noqa: FBT003
    with pytest.raises(KeyProviderUnavailable, match="DisabledException"):
        remote.provider.wrap(KEY, uuid4())
    with pytest.raises(KeyProviderUnavailable, match="enable it"):
        AwsKms(ARN)


@of_kms
def test_it_waits_for_no_credentials_and_leaves_rotation_to_kms(remote, monkeypatch) -> None:
    for command in (remote.provider.rotate, lambda: remote.provider.retire(1)):
        with pytest.raises(Conflict, match="aws kms"):
            command()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    before = remote.service.requests
    with pytest.raises(KeyProviderUnavailable, match="NoCredentialsError"):
        AwsKms(ARN)
    assert remote.service.requests == before
