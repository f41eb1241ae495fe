"""Digests: a model folder is loaded only when every file is the one its manifest names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from model_store.manifest import MANIFEST_NAME, Manifest
from serve_app.domain.errors import ModelContractError


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 of the manifest, which itself holds the digest of every other file."""
    return digest_file(folder / MANIFEST_NAME)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise ModelContractError unless every named file is there with its size and digest."""
    for name, expected in manifest.files.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ModelContractError(f"{path} is missing or outside the model folder.")
        if path.stat().st_size != expected.bytes or digest_file(path) != expected.sha256:
            raise ModelContractError(f"{path} is not the file its manifest names.")
