"""The embedder: a linear map a space, unit norm, finite values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from deployments.canary import Off, require_right, worst
from model_store.canary import Canary, read_canary
from model_store.manifest import EMBEDDING_DIM, EmbeddingSpaceSpec
from model_store.registry import MODELS_IN_MEMORY, Loaded, ModelStore, StoredModel
from serve_app.domain.errors import ModelContractError, StageFailed
from serve_app.records.serving import LiveModel


@dataclass(frozen=True, slots=True)
class EmbeddingSpace:
    """unit(matrix @ (bottleneck - mean)); mean 512, matrix 512×512, float32."""

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    @classmethod
    def from_model(cls, model: StoredModel, spec: EmbeddingSpaceSpec) -> Self:
        """Read a space's transform. Raises ModelContractError for another shape."""
        with np.load(model.path(spec.transform), allow_pickle=False) as arrays:
            mean, matrix = arrays["mean"].astype(np.float32), arrays["matrix"].astype(np.float32)
        if mean.shape != (EMBEDDING_DIM,) or matrix.shape != (EMBEDDING_DIM, EMBEDDING_DIM):
            raise ModelContractError(f"{spec.transform} has shapes {mean.shape} and {matrix.shape}.")
        return cls(mean, matrix)

    def embed(self, bottleneck: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed N×512 bottlenecks as N×512 unit vectors.

        Raises StageFailed when a vector is not finite or has no direction: such a vector must
        neither be stored nor searched with.
        """
        mapped = (bottleneck - self.mean) @ self.matrix.T
        norms = np.linalg.norm(mapped, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise StageFailed("The embedding is not finite.")
        return np.asarray(mapped / norms, dtype=np.float32)


class Embedder:
    """The embedding spaces it was asked for last, by model and name."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._spaces: Loaded[tuple[str, str], EmbeddingSpace] = Loaded(self._build, limit=MODELS_IN_MEMORY)
        self._canaries: dict[str, Canary | None] = {}

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether a model's space is loaded, so that `embed` computes at once."""
        return key in self._spaces

    def load(self, model_id: str, embedding_space: str) -> EmbeddingSpace:
        """Verify a model and read one of its spaces, unless that is done already.

        Raises ModelContractError when the model has no such space.
        """
        return self._spaces.get((model_id, embedding_space))

    def warm(self, models: Iterable[LiveModel]) -> dict[str, str]:
        """Read these models' spaces and keep them until others are named; returns the models' digests by id.

        Raises ModelContractError as `load` does.
        """
        wanted = [(model.model_id, model.embedding_space) for model in models]
        self._spaces.hold(wanted)
        for key in wanted:
            self._spaces.get(key)
        return {model_id: self._store.open(model_id).digest for model_id, _ in wanted}

    def _build(self, key: tuple[str, str]) -> EmbeddingSpace:
        model_id, embedding_space = key
        model = self._store.open(model_id)
        specs = {spec.embedding_space: spec for spec in model.manifest.spaces}
        if embedding_space not in specs:
            raise ModelContractError(f"{model_id} has no embedding space {embedding_space!r}.")
        space = EmbeddingSpace.from_model(model, specs[embedding_space])
        self._canaries[model_id] = canary = read_canary(model)
        require_right(model_id, lambda: _off(space, canary, embedding_space))
        return space

    def prove(self) -> Off:
        """Put its canary to each space that is held: how far the worst vector is off; None: none has one."""
        return worst(_off(self._spaces.get(key), self._canaries[key[0]], key[1]) for key in self._spaces.held)

    def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Embed one bottleneck (512) as a unit vector (512)."""
        space = self.load(model_id, embedding_space)
        return np.asarray(space.embed(bottleneck[np.newaxis])[0])


def _off(space: EmbeddingSpace, canary: Canary | None, embedding_space: str) -> Off:
    if canary is None:
        return None
    return canary.vector_off(embedding_space, space.embed(canary.bottleneck[np.newaxis])[0])
