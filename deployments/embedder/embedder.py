"""The embedder: a linear map a space, unit norm, finite values."""

from __future__ import annotations

from dataclasses import dataclass
import threading
from typing import Self

import numpy as np
from numpy.typing import NDArray

from model_store.manifest import EMBEDDING_DIM, EmbeddingSpaceSpec
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.errors import ModelContractError, StageFailed


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
    """Every embedding space it has been asked for, by model and name."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._spaces: dict[tuple[str, str], EmbeddingSpace] = {}
        self._lock = threading.Lock()

    def load(self, model_id: str, embedding_space: str) -> EmbeddingSpace:
        """Verify a model and read one of its spaces, unless that is done already.

        Raises ModelContractError when the model has no such space.
        """
        key = (model_id, embedding_space)
        with self._lock:
            if key not in self._spaces:
                model = self._store.open(model_id)
                specs = {spec.embedding_space: spec for spec in model.manifest.spaces}
                if embedding_space not in specs:
                    raise ModelContractError(f"{model_id} has no embedding space {embedding_space!r}.")
                self._spaces[key] = EmbeddingSpace.from_model(model, specs[embedding_space])
            return self._spaces[key]

    def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Embed one bottleneck (512) as a unit vector (512)."""
        space = self.load(model_id, embedding_space)
        return np.asarray(space.embed(bottleneck[np.newaxis])[0])
