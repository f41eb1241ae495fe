"""What is KMS's own: its answers, and what an operator is told."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from serve_app.domain.errors import Conflict, IntegrityError, InvalidSetting, KeyProviderUnavailable
from serve_app.keys.providers import retries
from serve_app.keys.providers.kms import AwsKms
from tests.serve_app.keys.key_service import KeyService
from tests.serve_app.keys.kms_server import Kms

ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd"


@pytest.fixture(scope="module")
def aws() -> Kms:
    made = Kms()
    made.make_key("1234abcd", alias="alias/derm")
    made.make_key("other")
    made.make_key("rsa", spec="RSA_2048")
    return made


@pytest.fixture(scope="module", autouse=True)
def service(aws: Kms) -> Iterator[KeyService]:
    running = KeyService(aws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "_FIRST_WAIT_S", 0.01)
        for name, value in {
            "AWS_ENDPOINT_URL_KMS": f"http://127.0.0.1:{running.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "*",
        }.items():
            patch.setenv(name, value)
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        yield running
    running.down()


@pytest.fixture(scope="module")
def provider(service: KeyService) -> AwsKms:
    return AwsKms(ARN)


def test_the_region_is_the_arns(aws: Kms, provider: AwsKms) -> None:
    key_id = uuid4()
    provider.wrap(bytes(32), key_id)
    last = aws.seen[-1]
    assert "/eu-central-1/kms/" in last["headers"]["Authorization"]
    assert last["headers"]["X-Amz-Target"] == "TrentService.Encrypt"
    assert last["body"]["EncryptionContext"] == {"derm-cds:data-key-id": str(key_id)}


def test_without_a_region_it_says_so() -> None:
    with pytest.raises(InvalidSetting, match="region"):
        AwsKms("alias/derm")


def test_another_keys_wrapping_is_refused(provider: AwsKms) -> None:
    key_id = uuid4()
    wrapped = AwsKms(ARN.replace("1234abcd", "other")).wrap(bytes(32), key_id)
    with pytest.raises(IntegrityError):
        provider.unwrap(wrapped, key_id)


def test_throttling_is_waited_out(provider: AwsKms, service: KeyService) -> None:
    service.faults = [400, 400]  # KMS throttles with 400
    provider.wrap(bytes(32), uuid4())


def test_an_operator_is_told_what_kms_does_itself(provider: AwsKms) -> None:
    with pytest.raises(Conflict, match="aws kms rotate-key-on-demand --key-id arn:aws"):
        provider.rotate()
    with pytest.raises(Conflict, match="schedule-key-deletion"):
        provider.retire(1)


def test_a_disabled_key_is_unavailable(aws: Kms, provider: AwsKms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aws.keys["1234abcd"], "enabled", False)  # noqa: FBT003
    with pytest.raises(KeyProviderUnavailable, match="DisabledException"):
        provider.wrap(bytes(32), uuid4())
    with pytest.raises(KeyProviderUnavailable, match="enable it"):
        AwsKms(ARN)


def test_a_key_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="SYMMETRIC_DEFAULT"):
        AwsKms(ARN.replace("1234abcd", "rsa"))
    with pytest.raises(KeyProviderUnavailable, match="NotFoundException"):
        AwsKms(ARN.replace("1234abcd", "nobody"))


def test_without_credentials_it_does_not_wait(monkeypatch: pytest.MonkeyPatch, service: KeyService) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    before = service.requests
    with pytest.raises(KeyProviderUnavailable, match="NoCredentialsError"):
        AwsKms(ARN)
    assert service.requests == before
