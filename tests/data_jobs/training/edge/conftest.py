from __future__ import annotations

import pytest

from model_store.registry import StoredModel


@pytest.fixture(scope="module")
def model(edge_model: StoredModel) -> StoredModel:
    return edge_model


@pytest.fixture(scope="module")
def model_id(model: StoredModel) -> str:
    return model.manifest.model_id
