"""Models by id: every file held to its digest, verified once, and kept side by side while one replaces another."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
import hashlib
from pathlib import Path
import re
import threading
from typing import Generic, TypeVar

from model_store.manifest import MANIFEST_NAME, FileDigest, Manifest, read_manifest
from serve_app.domain.errors import ModelContractError
from serve_app.records.serving import LiveModel


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_files(folder: Path, files: Mapping[str, FileDigest]) -> None:
    """Raise ModelContractError unless every named file is there with its size and digest."""
    for name, expected in files.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ModelContractError(f"{path} is missing or outside the model folder.")
        if path.stat().st_size != expected.bytes or digest_file(path) != expected.sha256:
            raise ModelContractError(f"{path} is not the file its manifest names.")


_MODEL_ID = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")

#: How many models a stage has in memory at most: the live one, a candidate, and one that a replay asks for.
MODELS_IN_MEMORY = 3

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Loaded(Generic[Key, Value]):
    """What is built from models, by key: built once, and let go of in the order of its last use.

    Safe to use from several threads. Nothing is built under the lock: while one key is built, only those that
    ask for the same one wait. A build that failed is forgotten, so that the next to ask tries again.
    """

    def __init__(self, build: Callable[[Key], Value], *, limit: int | None = None) -> None:
        """`limit`: how many values stay; None: all."""
        self._build, self._limit = build, limit
        self._lock = threading.Lock()
        self._values: OrderedDict[Key, Future[Value]] = OrderedDict()
        self._held: frozenset[Key] = frozenset()

    def __contains__(self, key: Key) -> bool:
        """Whether a value is there at once."""
        with self._lock:
            value = self._values.get(key)
            return value is not None and value.done()

    def get(self, key: Key) -> Value:
        """The value of a key; raises what building it raises."""
        with self._lock:
            value = self._values.get(key)
            if known := value is not None:
                self._values.move_to_end(key)
            else:
                value = self._values[key] = Future()
        if known:
            return value.result()
        try:
            value.set_result(self._build(key))
        except BaseException as error:
            with self._lock:
                del self._values[key]
            value.set_exception(error)
            raise
        with self._lock:
            self._let_go()
        return value.result()

    def hold(self, keys: Iterable[Key]) -> None:
        """Never let go of these, before others are named."""
        with self._lock:
            self._held = frozenset(keys)
            self._let_go()

    @property
    def held(self) -> frozenset[Key]:
        """What is never let go of, as far as it is there."""
        with self._lock:
            return frozenset(key for key in self._held if key in self._values and self._values[key].done())

    def _let_go(self) -> None:
        surplus = 0 if self._limit is None else len(self._values) - self._limit
        idle = [key for key, value in self._values.items() if value.done() and key not in self._held]
        for key in idle[: max(surplus, 0)]:
            del self._values[key]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A verified model folder; `digest` is its manifest's SHA-256, which holds that of every other file."""

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
        self._verified: Loaded[str, StoredModel] = Loaded(self._verify)

    def __iter__(self) -> Iterator[str]:
        """The ids of all models there are, in order."""
        return iter(sorted(path.parent.name for path in self._root.glob(f"*/{MANIFEST_NAME}")))

    def open(self, model_id: str) -> StoredModel:
        """Verify a model and return it.

        Raises ModelContractError when it is missing, altered, or not for this service. The first time reads
        all of it: an event loop asks `opened`.
        """
        return self._verified.get(model_id)

    async def opened(self, model_id: str) -> StoredModel:
        """Open a model from an event loop: in a thread, unless it has been verified."""
        if model_id in self._verified:
            return self._verified.get(model_id)
        return await asyncio.to_thread(self.open, model_id)

    def warm(self, models: Iterable[LiveModel]) -> dict[str, str]:
        """Verify these models; returns their digests by id."""
        return {model.model_id: self.open(model.model_id).digest for model in models}

    def _verify(self, model_id: str) -> StoredModel:
        if not _MODEL_ID.fullmatch(model_id):
            raise ModelContractError(f"{model_id!r} is not a model id.")
        folder = self._root / model_id
        manifest = read_manifest(folder)
        if manifest.model_id != model_id:
            raise ModelContractError(f"{folder} holds {manifest.model_id}.")
        verify_files(folder, manifest.files)
        return StoredModel(folder, manifest, digest_file(folder / MANIFEST_NAME))
