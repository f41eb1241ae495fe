"""The canary that ships is what the command makes, and none is made where the evaluation differs."""

from __future__ import annotations

from pathlib import Path
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_jobs.training.canary import make_canary
from data_jobs.training.evaluation.predictions import PREDICTIONS_NAME
from data_jobs.training.manifest_file import seal
from deployments.classifier.classifier import Classifier
from model_store.canary import read_canary
from model_store.registry import ModelStore

pytestmark = pytest.mark.torch


def test_every_model_that_ships_has_the_canary_that_the_command_makes(models: Path, isic_dir: Path) -> None:
    store = ModelStore(models)
    for model_id in store:
        model = store.open(model_id)
        kept, made = read_canary(model), make_canary(model, Classifier(store), isic_dir)
        assert kept is not None, model_id
        assert np.array_equal(kept.pixels, made.pixels)
        assert np.allclose(kept.nine, made.nine, rtol=1e-4, atol=0)
        assert 0.2 < kept.nine.max() < 0.6  # so unsure that a change shows
        assert set(kept.vectors) == {space.embedding_space for space in model.manifest.spaces}


def test_where_the_evaluation_comes_out_otherwise_there_is_no_canary(
    models: Path, model_id: str, isic_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / model_id
    shutil.copytree(models / model_id, folder)
    table = pq.read_table(folder / PREDICTIONS_NAME)
    table = table.set_column(
        table.schema.get_field_index("MEL"), "MEL", pa.array(table["MEL"].to_numpy() + np.float32(0.01))
    )
    pq.write_table(table, folder / PREDICTIONS_NAME)
    seal(folder)
    store = ModelStore(tmp_path)
    model = store.open(model_id)
    with pytest.raises(ValueError, match="otherwise than it was evaluated"):
        make_canary(model, Classifier(store), isic_dir)
