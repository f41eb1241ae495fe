"""Who holds the key-encryption keys: a file of this node, Vault or AWS KMS; one URL says which."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from serve_app.domain.errors import InvalidSetting, KeyProviderUnavailable
from serve_app.keys.keyring import FileKeyring, KeyProvider
from serve_app.settings import KeySettings


def open_key_provider(settings: KeySettings, *, first_start: bool = False) -> KeyProvider:
    """Open the provider that DERM_KEY_PROVIDER names, and see that it answers.

    `file:` is the node's keyring, `file:/a/path` another one; the modules of this folder say what `vault://…` and
    `kms:…` look like. A missing keyring is made at the `first_start`, before there is a key store, and never again:
    KeyProviderUnavailable then. InvalidSetting when it is none of them, or its package is not installed.
    """
    url = settings.key_provider
    scheme, _, rest = url.partition(":")
    if scheme == "file":
        path = Path(rest) if rest else settings.files.keyring
        return FileKeyring.make(path) if first_start else FileKeyring(path)
    # Neither package is imported where nobody uses it: 30 MB a process.
    try:
        if scheme in {"vault", "vault+http"}:
            from serve_app.keys.providers.vault import VaultAddress, VaultTransit  # noqa: PLC0415

            return VaultTransit(VaultAddress.parse(url), partial(_vault_token, settings))
        if scheme == "kms" and rest:
            from serve_app.keys.providers.kms import AwsKms  # noqa: PLC0415

            return AwsKms(rest)
    except ModuleNotFoundError as error:
        lock = scheme.removesuffix("+http")
        raise InvalidSetting(
            f"{error.name} is not installed: stop the service, then `DERM_LOCKS={lock} scripts/serve`."
        ) from error
    raise InvalidSetting("DERM_KEY_PROVIDER is none of file:, vault://HOST/MOUNT/KEY and kms:KEY.")


def _vault_token(settings: KeySettings) -> str:
    path = settings.vault_token_file
    try:
        token = path.read_text().strip() if path else settings.vault_token.get_secret_value()
    except (OSError, ValueError) as error:
        raise KeyProviderUnavailable(f"Vault's token cannot be read from {path}: {error}") from error
    if not token:
        raise KeyProviderUnavailable("Vault's token is missing: set DERM_VAULT_TOKEN_FILE or VAULT_TOKEN.")
    return token
