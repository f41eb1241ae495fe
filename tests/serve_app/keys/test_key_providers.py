"""Vault and KMS through their real clients, over HTTP, against their API: what holds of every provider."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
import logging
import os
from pathlib import Path
import time
import traceback
from uuid import uuid4

import pytest

from serve_app.domain.errors import IntegrityError, KeyProviderUnavailable
from serve_app.keys.envelope import seal
from serve_app.keys.keyring import KeyProvider, WrappedKey
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import kms, open_key_provider, retries, vault
from serve_app.settings import KeySettings
from tests.serve_app.keys.key_files import BINDING
from tests.serve_app.keys.key_service import KeyService
from tests.serve_app.keys.kms_server import Kms
from tests.serve_app.keys.vault_server import Vault

KEY = bytes(range(32))


@dataclass(frozen=True)
class Remote:
    """A provider, the service behind it, and the operations that it forbids."""

    provider: KeyProvider
    service: KeyService
    again: Callable[[], KeyProvider]
    forbidden: set[str]

    def forbid(self) -> None:
        self.forbidden.update(("decrypt", "Decrypt"))


@pytest.fixture(scope="module", params=["vault", "vault-derived", "kms"])
def opened(request, tmp_path_factory) -> Iterator[Remote]:
    """Each provider with time-outs that suit a test."""
    home = tmp_path_factory.mktemp("home")
    settings = KeySettings(home=home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "_FIRST_WAIT_S", 0.01)
        patch.setattr(retries, "_REST_S", 0.05)
        for module in (vault, kms):
            patch.setattr(module, "READ_TIMEOUT_S", 0.3)
        patch.setenv("NO_PROXY", "*")
        if request.param == "kms":
            aws = Kms()
            aws.make_key("1234abcd", alias="alias/derm")
            service, forbidden = KeyService(aws), aws.denied
            patch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{service.port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "test")
            patch.setenv("AWS_REGION", "eu-central-1")
            settings.key_provider = "kms:alias/derm"
        else:
            transit = Vault()
            transit.make_key("derm", derived=request.param == "vault-derived")
            service, forbidden = KeyService(transit), transit.forbidden
            (home / "token").write_text(f"{transit.token}\n")
            settings.vault_token_file = home / "token"
            settings.key_provider = f"vault+http://127.0.0.1:{service.port}/transit/derm"
        again = partial(open_key_provider, settings)
        yield Remote(again(), service, again, forbidden)
        service.down()


@pytest.fixture
def remote(opened: Remote) -> Remote:
    """As it was opened: nothing is forbidden, nothing in trouble, and nobody rests."""
    opened.forbidden.clear()
    opened.service.faults = []
    opened.provider._retries._rests_until = 0.0
    return opened


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
    remote.forbid()
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
