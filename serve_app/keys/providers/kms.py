"""Key-encryption keys in AWS KMS: they never leave it.

    kms:alias/NAME    kms:KEY-ID    kms:arn:aws:kms:REGION:ACCOUNT:key/KEY-ID

Region and credentials are found as AWS's own tools find them, an ARN's region coming first.
The role needs kms:Encrypt, kms:Decrypt and kms:DescribeKey on the key.
Source: docs.aws.amazon.com/kms/latest/APIReference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
import logging
import os
from typing import Any
from uuid import UUID

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NotConnected

from serve_app.domain.errors import Conflict, IntegrityError, InvalidSetting, KeyProviderUnavailable
from serve_app.keys.keyring import DATA_KEY_BYTES, KeyProvider, WrappedKey
from serve_app.keys.providers.retries import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, RetryPolicy, Unanswered

#: KMS chooses the key material by what the ciphertext says; to us there is one version.
_VERSION = 1

# At level DEBUG botocore logs every request's body: here, data keys.
logging.getLogger("botocore").setLevel(logging.INFO)


class AwsKms(KeyProvider):
    """One symmetric KMS key. A wrapped key is KMS's ciphertext; the data key's id is its encryption context.

    The context is written to CloudTrail in clear: the id is a random number, and says nothing of a patient.
    """

    def __init__(self, key_id: str) -> None:
        self._key_id = key_id
        self._retries = RetryPolicy("AWS KMS")
        parts = key_id.split(":")
        region = parts[3] if key_id.startswith("arn:") and len(parts) > 5 else os.environ.get("AWS_REGION")
        try:
            once = {"total_max_attempts": 1}  # `RetryPolicy` asks again
            config = Config(connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S, retries=once)
            self._client = boto3.session.Session(region_name=region).client("kms", config=config)
        except BotoCoreError as error:
            raise InvalidSetting(f"AWS KMS cannot be used: {error}") from error
        key = self._ask(self._client.describe_key)["KeyMetadata"]
        if key.get("KeyUsage") != "ENCRYPT_DECRYPT" or key.get("KeySpec") != "SYMMETRIC_DEFAULT":
            raise InvalidSetting(
                f"{self} is no symmetric encryption key: make one of spec SYMMETRIC_DEFAULT."
            )
        if not key.get("Enabled"):
            raise KeyProviderUnavailable(f"{self} is {key.get('KeyState', 'disabled')}: enable it.")

    def __str__(self) -> str:
        return f"AWS KMS key {self._key_id}"

    @property
    def current_version(self) -> int:
        """Always 1: KMS rotates its key material inside the key."""
        return _VERSION

    @property
    def versions(self) -> tuple[int, ...]:
        """The one version there is."""
        return (_VERSION,)

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        """Have KMS encrypt a data key, bound to its id."""
        answer = self._ask(self._client.encrypt, data_key_id, Plaintext=data_key)
        return WrappedKey(bytes(answer["CiphertextBlob"]), _VERSION)

    def unwrap(self, wrapped_key: WrappedKey, data_key_id: UUID) -> bytes:
        """Have KMS decrypt a data key; IntegrityError when it, its id or its version is not as wrapped."""
        if wrapped_key.key_version != _VERSION:
            raise IntegrityError(f"AWS KMS has no version {wrapped_key.key_version}")
        answer = self._ask(self._client.decrypt, data_key_id, CiphertextBlob=wrapped_key.wrapped)
        data_key = bytes(answer["Plaintext"])
        if len(data_key) != DATA_KEY_BYTES:
            raise IntegrityError(f"AWS KMS did not wrap data key {data_key_id}")
        return data_key

    def rotate(self) -> int:
        """Conflict, always: it says how KMS is told to."""
        raise Conflict(
            "AWS KMS rotates its own key material, and nothing has to be rewrapped. Once a year: `aws kms "
            f"enable-key-rotation --key-id {self._key_id}`; now: `aws kms rotate-key-on-demand --key-id {self._key_id}`."
        )

    def check_retirement(self, version: int) -> None:
        """Conflict, always: KMS destroys a key as a whole."""
        raise Conflict(
            f"AWS KMS keeps the material of version {version} for as long as the key: only `aws kms "
            "schedule-key-deletion` destroys it, and with it every image."
        )

    def retire(self, version: int) -> None:
        """Conflict, always."""
        self.check_retirement(version)

    def _ask(
        self, operation: Callable[..., dict[str, Any]], data_key_id: UUID | None = None, **fields: object
    ) -> dict[str, Any]:
        """Ask for an operation with our key; `data_key_id` binds what is encrypted or decrypted."""
        if data_key_id is not None:
            fields["EncryptionContext"] = {"derm-cds:data-key-id": str(data_key_id)}
        return self._retries.ask(lambda: _answer(partial(operation, KeyId=self._key_id, **fields)))


def _answer(request: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Send one request, and sort what may come back; no cause is kept, for causes hold requests."""
    try:
        return request()
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    except (HTTPClientError, NotConnected) as error:
        raise Unanswered(type(error).__name__) from None
    except BotoCoreError as error:
        # No credentials, no region, an endpoint that is none: nothing that waiting would change.
        raise KeyProviderUnavailable(f"AWS KMS cannot be asked: {type(error).__name__}.") from None
    if code in {"InvalidCiphertextException", "IncorrectKeyException"}:
        raise IntegrityError("AWS KMS did not wrap this data key, or not for this id")
    if code in {"RequestTimeout", "ThrottlingException"} or status >= 500:
        raise Unanswered(code or f"HTTP {status}")
    raise KeyProviderUnavailable(f"AWS KMS refuses ({code}): look at the key, its policy and the role.")
