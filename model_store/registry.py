"""Loaded models by id: verified once, kept side by side while one replaces another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
import re
import threading

from model_store.integrity import model_digest, verify_files
from model_store.manifest import MANIFEST_NAME, Manifest, read_manifest
from serve_app.domain.errors import ModelContractError

_MODEL_ID = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model folder that has been verified: every file is the one its manifest names."""

    folder: Path
    manifest: Manifest
    digest: str

    def path(self, name: str) -> Path:
        """The path of one of the files that the manifest vouches for."""
        if name not in self.manifest.files:
            raise ModelContractError(f"{name} is not a file of {self.manifest.model_id}.")
        return self.folder / name


class ModelStore:
    """The folder of model folders. Verification runs once a model and process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._verified: dict[str, StoredModel] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        """The ids of all models there are, in order."""
        return iter(sorted(path.parent.name for path in self._root.glob(f"*/{MANIFEST_NAME}")))

    def open(self, model_id: str) -> StoredModel:
        """Verify a model and return it.

        Raises ModelContractError when it is missing, altered, or not for this service.
        """
        with self._lock:
            if model_id not in self._verified:
                self._verified[model_id] = self._verify(model_id)
            return self._verified[model_id]

    def _verify(self, model_id: str) -> StoredModel:
        if not _MODEL_ID.fullmatch(model_id):
            raise ModelContractError(f"{model_id!r} is not a model id.")
        folder = self._root / model_id
        manifest = read_manifest(folder)
        if manifest.model_id != model_id:
            raise ModelContractError(f"{folder} holds {manifest.model_id}.")
        verify_files(folder, manifest)
        return StoredModel(folder, manifest, model_digest(folder))
