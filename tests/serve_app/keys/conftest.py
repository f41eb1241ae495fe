"""Real keys in a folder of the test's own, and programs of our own beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
import os
from pathlib import Path
import subprocess
import sys

import pytest

from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore

REPOSITORY = Path(__file__).resolve().parents[3]

Started = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The folder of keyring and key store; not there yet."""
    return tmp_path / "keys"


@pytest.fixture
def keyring(keys: Path) -> FileKeyring:
    return FileKeyring.make(keys / "keyring.json")


@pytest.fixture
def store(keys: Path, keyring: FileKeyring) -> Iterator[KeyStore]:
    with closing(KeyStore(keys / "keystore.sqlite", keyring)) as store:
        yield store


@pytest.fixture
def start(keys: Path) -> Iterator[Started]:
    """Start a Python program that opens a key store of its own on `keys` when told "go"."""
    processes: list[subprocess.Popen[str]] = []

    def _start(body: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PREAMBLE + body, str(keys)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        processes.append(process)
        return process

    yield _start
    for process in processes:
        process.kill()
        process.communicate()


_PREAMBLE = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import sys
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore

keys = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
store = KeyStore(keys / "keystore.sqlite", FileKeyring.make(keys / "keyring.json"))
"""
