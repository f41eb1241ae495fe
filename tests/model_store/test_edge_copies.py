"""A copy is opened only when it is the file that was certified, for the model that answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
import json
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.manifest_file import seal
from model_store.edge_copies import EDGE_NAME, GOLDEN_NAME, open_copy
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession
from serve_app.domain.errors import ModelContractError

BUDGET = 70_000_000
LITERT_BUDGET = 15_000_000


@pytest.fixture
def changed(altered: Callable[..., Path], model_id: str) -> Callable[..., StoredModel]:
    """A copy of the model in which a JSON file is another, with a true digest; `(name, change) -> model`."""

    def change_file(name: str, change: Callable[[dict], None]) -> StoredModel:
        folder = altered() / model_id
        content = json.loads((folder / name).read_bytes())
        change(content)
        (folder / name).unlink()  # a hard link: the original stays as it is
        (folder / name).write_text(json.dumps(content))
        seal(folder)
        return ModelStore(folder.parent).open(model_id)

    return change_file


def test_every_copy_is_certified_and_within_its_gate(model: StoredModel) -> None:
    copies = json.loads(model.path(EDGE_NAME).read_bytes())["copies"]
    assert copies
    for copy in copies.values():
        assert copy["certificate"]["shipped"]
        folds = [fold for name, fold in copy["certificate"].items() if name.startswith("fold")]
        assert folds
        for fold in folds:
            point = fold["operating_points"]["melanoma"]
            assert point["sensitivity_server"] - point["sensitivity"] <= 0.005 + 1e-9


def test_all_models_together_stay_small(models: Path) -> None:
    assert sum(path.stat().st_size for path in models.rglob("*") if path.is_file()) <= BUDGET
    for path in models.rglob("*.tflite"):
        assert path.stat().st_size <= LITERT_BUDGET


def test_a_copy_answers_as_the_server_does(model: StoredModel) -> None:
    _, side, _ = model.manifest.input.input_size
    pixels = np.random.default_rng(1).integers(90, 200, (2, side, side, 3)).astype(np.uint8)
    logits, bottleneck, *_ = InferenceSession(model, threads=1).run(pixels)
    found = open_copy(model, "float16", threads=1).run(pixels)
    assert np.abs(found[0] - logits).max() < 0.05
    assert np.abs(found[1] - bottleneck).max() < 0.05


def test_an_unknown_copy_and_another_runtime_are_refused(model: StoredModel) -> None:
    with pytest.raises(ModelContractError, match="no edge copy 'int4'"):
        open_copy(model, "int4", threads=1)
    copies = json.loads(model.path(EDGE_NAME).read_bytes())["copies"]
    others = [name for name, copy in copies.items() if copy["runtime"] != "onnxruntime"]
    assert others
    for name in others:
        with pytest.raises(ModelContractError, match="not on ONNX Runtime"):
            open_copy(model, name, threads=1)


def _raise_a_logit(golden: dict, *, by: float) -> None:
    golden["images"][-1]["copies"]["float16"]["logits"][0] += by


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (GOLDEN_NAME, partial(_raise_a_logit, by=1.0), "answers otherwise on this processor"),
        (GOLDEN_NAME, partial(_raise_a_logit, by=float("nan")), "answers otherwise on this processor"),
        (GOLDEN_NAME, lambda golden: golden["logit_tolerance"].clear(), "KeyError"),
        (EDGE_NAME, lambda edge: edge["server"].update(temperature=9.0), "another model or calibration"),
        (EDGE_NAME, lambda edge: edge["copies"]["float16"].update(file="elsewhere.onnx"), "is not the file"),
        (EDGE_NAME, lambda edge: edge["copies"]["float16"].update(sha256="0" * 64), "is not the file"),
    ],
)
def test_a_copy_is_refused_that_is_not_what_was_certified(changed, name: str, change, message: str) -> None:
    with pytest.raises(ModelContractError, match=message):
        open_copy(changed(name, change), "float16", threads=1)
