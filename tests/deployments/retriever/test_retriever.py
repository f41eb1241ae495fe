"""The references that ship with the model; how they are searched is tested with the records."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_jobs.references.load import read_bundle
from model_store.registry import ModelStore
from serve_app.domain.diagnosis import MALIGNANT


def test_every_shipped_reference_may_be_shown(models: Path, model_id: str) -> None:
    model = ModelStore(models).open(model_id)
    bundle = read_bundle(model, model.manifest.live_space)
    assert len({image.isic_id for image in bundle.images}) == len(bundle.images) >= 1000
    assert all(image.copyright_license and image.attribution for image in bundle.images)
    assert {image.diagnosis for image in bundle.images} > set(MALIGNANT)
    norms = np.linalg.norm(bundle.embeddings, axis=1)
    assert np.abs(norms - 1).max() < 1e-2
