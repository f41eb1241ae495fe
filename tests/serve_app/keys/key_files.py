"""The files of a key store and its keyring, looked at and tampered with from outside."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
import sqlite3
from uuid import UUID

from serve_app.keys.envelope import ImageBinding

BINDING = ImageBinding(UUID(int=1), "patient-1", "image/jpeg")


def sqlite(keystore: Path, statement: str, *values: object) -> list[tuple]:
    with closing(sqlite3.connect(keystore)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def count_keys(keystore: Path) -> int:
    return sqlite(keystore, "SELECT count(*) FROM data_keys")[0][0]


def bytes_on_disk(keys: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(keys.iterdir()))


def put_in_place(keyring: Path, content: bytes) -> None:
    """Put a keyring in the place of the one that is there, as an operator does."""
    copied = keyring.with_name("copied")
    copied.touch(mode=0o600)
    copied.write_bytes(content)
    copied.replace(keyring)
