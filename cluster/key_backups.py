"""Backing up the keys: the key store and the keyring, each apart from the database and from the other.

A key store's backup still holds the keys of what is erased after it: so it says when it must be gone, is refused
after that, and `prune` deletes it. A keyring's opens what any key store's holds.

What a restore kept of the home, and what one that was killed left, is as good as a backup and as dangerous: of an
image that is erased afterwards such a key store has the wrapped key, such a data directory the ciphertext and the
vector. So it expires as key backups do; `derm-cds backup --prune` deletes it then, `derm-cds status` names it until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
import os
from pathlib import Path
import re
import shutil
import sqlite3
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cluster.backup_folder import new_folder, read_manifest, refuse_others, require_space, write_manifest
from serve_app.audit.checkpoints import signing_key
from serve_app.domain.errors import Conflict, DataKeyMissing, DermError, IntegrityError, NotFound
from serve_app.keys.keyring import KeyProvider
from serve_app.keys.keystore import DestroyedKey, KeyStore
from serve_app.private_files import locked_folder, read_private, remove_secret, write_private
from serve_app.records.pool import Pool
from serve_app.settings import NodeFiles
from serve_app.sql import parse

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())

#: How long a key store's backup, and whatever is as good as one, may be kept unless somebody says otherwise.
LIFETIME = timedelta(days=30)
#: No backup or restore is at work for so long: what it has not finished by then was cut off.
CUT_OFF_AFTER = timedelta(days=1)

_BEFORE = re.compile(r"\.before-(\d{8}T\d{6})(\d{6})?$")
_LOG_SUFFIXES = ("-wal", "-shm", "-journal")

_STORE = "keystore.sqlite"
_VERSIONS = "SELECT key_version, count(*) FROM data_keys GROUP BY key_version ORDER BY key_version"


def existing_keystore(home: Path) -> Path:
    """Where the key store of this home is. NotFound when there is none: no command makes one, or a keyring."""
    path = NodeFiles(home).keystore
    if not path.exists():
        raise NotFound(
            f"There is no key store at {path}: the first start makes it. If there was one, put its backup back."
        )
    return path


def back_up_keys(files: NodeFiles, folder: Path, *, provider: str, lifetime: timedelta) -> dict[str, Any]:
    """Copy the key store as it is at one moment, while it is used, into `folder`; return the manifest.

    `provider` names whoever can unwrap it. NotFound when there is no key store.
    """
    existing_keystore(files.home)
    require_space(folder, files.keystore.stat().st_size)
    with new_folder(folder) as partial:
        copy = partial / _STORE
        os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with (
            closing(sqlite3.connect(files.keystore.as_uri() + "?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")  # one file, whole by itself
            versions = dict(target.execute(_VERSIONS).fetchall())
            (verdict,) = target.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            raise IntegrityError(f"The key store is damaged: {verdict}.")
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        return write_manifest(
            partial,
            "keys",
            files.audit_signing_key,
            expires_at=(datetime.now(UTC) + lifetime).isoformat(timespec="seconds"),
            key_provider=provider,
            data_keys_by_key_version=versions,
        )


def back_up_keyring(files: NodeFiles, folder: Path) -> dict[str, Any]:
    """Copy the keyring, and the key that signs checkpoints, into `folder`; return the manifest.

    NotFound when the key-encryption keys are not in a file here.
    """
    if not files.keyring.exists():
        raise NotFound(
            f"There is no keyring at {files.keyring}: Vault and KMS back their keys up themselves."
        )
    signing_key(files.audit_signing_key)  # that there is one to be copied
    with new_folder(folder) as partial:
        # Alone with the keys: a keyring that is replaced meanwhile is overwritten, and must not be backed up so.
        with locked_folder(files.keyring.parent):
            for path in (files.keyring, files.audit_signing_key):
                write_private(partial / path.name, read_private(path))
        return write_manifest(partial, "keyring", files.audit_signing_key)


def restore_keys(
    files: NodeFiles,
    folder: Path,
    provider: KeyProvider,
    *,
    trusted: Ed25519PublicKey | None,
    erased: Iterable[DestroyedKey],
) -> Path | None:
    """Put a key store's backup, which `trusted` signed (None: whoever did), in place; returns where the old one is now.

    The keys of `erased` images, and those that the old key store knows to be destroyed, are
    destroyed in it before it can be used. Conflict after its expiry; IntegrityError when it is
    changed or not signed so, or `provider` did not wrap it. Nothing has changed then.
    """
    manifest = read_manifest(folder, "keys", trusted)
    refuse_others(folder, manifest)
    if expiry(manifest) <= datetime.now(UTC):
        raise Conflict(
            f"This key backup expired on {manifest['expires_at']}: it must not be used, but pruned."
        )
    content = (folder / _STORE).read_bytes()
    if sha256(content).hexdigest() != manifest["files"][_STORE]:
        raise IntegrityError(f"{folder / _STORE} is not what was backed up: its SHA-256 has changed.")
    partial = files.keystore.with_name(f"{_STORE}.restored")
    gone = [*erased, *_destroyed(files.keystore, provider)]
    try:
        with locked_folder(files.keystore.parent):
            write_private(partial, content)
        with closing(KeyStore(partial, provider)) as store:
            for key in gone:
                # One that was accepted, not proven, and is not in this backup: nothing to destroy.
                with suppress(DataKeyMissing):
                    store.destroy(key)
    except BaseException:
        for path in files.keystore.parent.glob(f"{partial.name}*"):
            remove_secret(path)
        raise
    # Closed, a store has neither log nor index beside it: one rename moves it whole.
    with locked_folder(files.keystore.parent):
        kept = _set_aside(files.keystore)
        partial.rename(files.keystore)
    return kept


def prune(root: Path) -> list[Path]:
    """Delete every key store's backup at or right below `root` that has expired or was cut off; returns which."""
    gone = []
    for folder in [root, *sorted(path for path in root.iterdir() if path.is_dir())]:
        # A link may lead to a key store in use: who can write here may have laid it.
        if _has_expired(folder) and not folder.is_symlink():
            if not (folder / _STORE).is_symlink():
                remove_secret(folder / _STORE)
            shutil.rmtree(folder)
            gone.append(folder)
    return gone


def _has_expired(folder: Path) -> bool:
    if folder.suffix == ".partial" and (folder / _STORE).exists():  # killed, with a manifest or without
        touched = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        return datetime.fromtimestamp(touched, UTC) + CUT_OFF_AFTER <= datetime.now(UTC)
    try:
        return expiry(read_manifest(folder, "keys", None)) <= datetime.now(UTC)
    except DermError:  # no backup, or of something else
        return False


def _destroyed(path: Path, provider: KeyProvider) -> list[DestroyedKey]:
    if not path.exists():
        return []
    try:
        with closing(KeyStore(path, provider)) as store:
            found: list[DestroyedKey] = []
            after = 0
            while page := store.list_destroyed(after=after):
                found += [key for _, key in page]
                after = page[-1][0]
            return found
    except IntegrityError:  # damaged: why a backup is wanted
        return []


def _set_aside(store: Path) -> Path | None:
    kept = store.with_name(f"{store.name}.before-{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
    moved = [store.with_name(f"{store.name}{suffix}") for suffix in ("", "-wal", "-shm")]
    for path in moved:
        if path.exists():
            path.rename(kept.with_name(path.name.replace(store.name, kept.name, 1)))
    return kept if kept.exists() else None


def expiry(manifest: Mapping[str, Any]) -> datetime:
    """When a key backup must be gone; IntegrityError when its manifest does not say."""
    try:
        return datetime.fromisoformat(manifest["expires_at"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError("The key backup's manifest has no expires_at.") from error


async def read_erased(pool: Pool) -> list[DestroyedKey]:
    """Read every erasure that the database knows of: whose keys a restored key store must not bring back."""
    if not await pool.fetchval(_SQL["known"], "erasures"):
        return []
    return [DestroyedKey(**row) for row in await pool.fetch(_SQL["erased"])]


async def release_key_store(pool: Pool) -> None:
    """Have the database belong to whichever key store it is started with next, if that knows its images' keys."""
    if await pool.fetchval(_SQL["known"], "key_stores"):
        await pool.execute(_SQL["release"])


@dataclass(frozen=True, slots=True)
class KeptCopy:
    """A key store or a data directory beside the one in use, and when it must be gone."""

    path: Path
    expires_at: datetime


def find_kept_copies(home: Path, *, lifetime: timedelta = LIFETIME) -> list[KeptCopy]:
    """Find what restores have kept in this home, the first to expire first."""
    store = NodeFiles(home).keystore
    kept = [
        *((path, lifetime) for path in store.parent.glob(f"{store.name}.before-*")),
        *((path, CUT_OFF_AFTER) for path in store.parent.glob(f"{store.name}.restored*")),
        *((path, lifetime) for path in (home / "postgres").glob("data.before-*")),
    ]
    # What SQLite has beside a store goes with it; alone, it is a copy as well.
    names = {path.name for path, _ in kept}
    copies = []
    for path, until in kept:
        whole = next((path.name.removesuffix(s) for s in _LOG_SUFFIXES if path.name.endswith(s)), None)
        if whole not in names:
            copies.append(KeptCopy(path, _since(path) + until))
    return sorted(copies, key=lambda copy: copy.expires_at)


def prune_kept_copies(home: Path, *, lifetime: timedelta = LIFETIME) -> list[Path]:
    """Delete what has expired of it, key stores overwritten first; returns which."""
    gone = []
    for copy in find_kept_copies(home, lifetime=lifetime):
        if copy.expires_at > datetime.now(UTC):
            continue
        if copy.path.is_dir():
            shutil.rmtree(copy.path)
        else:
            with locked_folder(copy.path.parent):
                for suffix in ("", *_LOG_SUFFIXES):
                    path = copy.path.with_name(f"{copy.path.name}{suffix}")
                    remove_secret(path)
        gone.append(copy.path)
    return gone


def _since(path: Path) -> datetime:
    """When it was set aside, which its name says; its file's time would be that of its last change, long before."""
    named = _BEFORE.search(path.name)
    if named is not None:
        return datetime.strptime(named[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
