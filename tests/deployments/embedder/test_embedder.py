"""Unit vectors of a model's spaces, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from deployments.embedder.embedder import Embedder, EmbeddingSpace
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.errors import ModelContractError, StageFailed


@pytest.fixture(scope="module")
def space(model: StoredModel) -> str:
    return model.manifest.live_space.embedding_space


@pytest.fixture(scope="module")
def embedder(models: Path, model_id: str, space: str) -> Embedder:
    embedder = Embedder(ModelStore(models))
    embedder.load(model_id, space)
    return embedder


def test_it_is_a_linear_map_of_unit_norm() -> None:
    mean = np.zeros(512, np.float32)
    mean[:2] = (1.0, 2.0)
    matrix = np.zeros((512, 512), np.float32)
    matrix[0, 0], matrix[1, 1], matrix[1, 0] = 3.0, 1.0, 0.5
    bottleneck = np.zeros((1, 512), np.float32)
    bottleneck[0, :2] = (2.0, 5.5)
    found = EmbeddingSpace(mean, matrix).embed(bottleneck)[0]
    assert (found.shape, found.dtype) == ((512,), np.float32)
    # (2 - 1, 5.5 - 2) = (1, 3.5); mapped: (3, 3.5 + 0.5); unit: (3, 4) / 5
    assert found[:2].tolist() == pytest.approx([0.6, 0.8], abs=1e-6)
    assert not found[2:].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bottleneck_that_is_not_finite_fails_the_stage(
    embedder: Embedder, model_id: str, space: str, bad: float
) -> None:
    bottleneck = np.ones(512, np.float32)
    bottleneck[7] = bad
    # Neither has a vector without a direction.
    for wrong in (bottleneck, embedder.load(model_id, space).mean.copy()):
        with np.errstate(all="ignore"), pytest.raises(StageFailed, match="finite"):
            embedder.embed(model_id, space, wrong)


def test_another_space_or_model_is_refused(embedder: Embedder, model_id: str, space: str) -> None:
    bottleneck = np.ones(512, np.float32)
    with pytest.raises(ModelContractError, match="no embedding space"):
        embedder.embed(model_id, "another space", bottleneck)
    with pytest.raises(ModelContractError):
        embedder.embed("nobody.here", space, bottleneck)


def test_a_transform_of_another_shape_is_refused(tmp_path: Path, model: StoredModel) -> None:
    np.savez(tmp_path / "space.npz", mean=np.zeros(256), matrix=np.eye(256))

    class Elsewhere:
        """A model whose transform is the small one."""

        manifest = model.manifest

        def path(self, _: str) -> Path:
            return tmp_path / "space.npz"

    with pytest.raises(ModelContractError, match="shapes"):
        EmbeddingSpace.from_model(Elsewhere(), model.manifest.live_space)
