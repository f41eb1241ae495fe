"""A copy is opened only when it is the file that was certified, for the model that answers."""

from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.manifest_file import seal
from model_store.edge_copies import EDGE_NAME, check_golden, find_copy, list_copies, open_copy, read_copy
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession
from serve_app.domain.errors import ModelContractError

BUDGET = 60_000_000
LITERT_BUDGET = 15_000_000


@pytest.fixture(scope="module")
def model(models: Path, model_id: str) -> StoredModel:
    stored = ModelStore(models).open(model_id)
    assert list_copies(stored), f"{model_id} ships no edge copies: run data_jobs.training.edge.build"
    return stored


def replace(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link: the original stays as it is
    path.write_bytes(content)


def test_every_copy_is_certified_and_within_its_gate(model: StoredModel) -> None:
    for copy in list_copies(model):
        assert copy.certificate["shipped"]
        folds = [name for name in copy.certificate if name.startswith("fold")]
        assert folds
        for fold in folds:
            point = copy.certificate[fold]["operating_points"]["melanoma"]
            assert point["sensitivity_server"] - point["sensitivity"] <= 0.005 + 1e-9


def test_all_models_together_stay_small(models: Path) -> None:
    assert sum(path.stat().st_size for path in models.rglob("*") if path.is_file()) <= BUDGET
    for path in models.rglob("*.tflite"):
        assert path.stat().st_size <= LITERT_BUDGET


def test_a_copy_answers_as_the_server_does(model: StoredModel) -> None:
    _, side, _ = model.manifest.input.input_size
    pixels = np.random.default_rng(1).integers(90, 200, (2, side, side, 3)).astype(np.uint8)
    logits, bottleneck = InferenceSession(model, threads=1).run(pixels)
    session = open_copy(model, "float16", threads=1)
    found = session.run(pixels)
    assert np.abs(found[0] - logits).max() < 0.05
    assert np.abs(found[1] - bottleneck).max() < 0.05


def test_an_unknown_copy_and_another_runtime_are_refused(model: StoredModel) -> None:
    with pytest.raises(ModelContractError, match="no edge copy 'int4'"):
        find_copy(model, "int4")
    for copy in list_copies(model):
        if copy.runtime != "onnxruntime":
            with pytest.raises(ModelContractError, match="not on ONNX Runtime"):
                open_copy(model, copy.name, threads=1)


@pytest.mark.parametrize(
    "name", ["model.float16.onnx", "model.int8.onnx", "model.tflite", "golden.json", EDGE_NAME]
)
def test_one_changed_bit_is_refused(
    model: StoredModel, altered: Callable[..., Path], model_id: str, name: str
) -> None:
    if name not in model.manifest.files:
        # Left out by its gate: then the certificates say why.
        left_out = json.loads(model.path(EDGE_NAME).read_text())["left_out"]
        assert all(left_out[name.split(".")[1]]["problems"])
        return
    store = altered()
    path = store / model_id / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))
    with pytest.raises(ModelContractError, match=name.replace(".", r"\.")):
        ModelStore(store).open(model_id)


def test_a_file_changed_after_verification_is_refused(
    model: StoredModel, altered: Callable[..., Path], model_id: str
) -> None:
    store = altered()
    opened = ModelStore(store).open(model_id)
    copy = find_copy(opened, "float16")
    content = bytearray((opened.folder / copy.file).read_bytes())
    content[-1] ^= 1
    replace(opened.folder / copy.file, bytes(content))
    with pytest.raises(ModelContractError, match="not the file its certificate names"):
        read_copy(opened, copy)
    with pytest.raises(ModelContractError, match="not the file its certificate names"):
        open_copy(opened, "float16", threads=1)


def test_a_copy_that_answers_otherwise_on_this_processor_is_refused(
    model: StoredModel, altered: Callable[..., Path], model_id: str
) -> None:
    store = altered()
    path = store / model_id / "golden.json"
    golden = json.loads(path.read_bytes())
    golden["images"][-1]["copies"]["float16"]["logits"][0] += 2 * golden["logit_tolerance"]["float16"]
    replace(path, json.dumps(golden).encode())
    seal(store / model_id)
    with pytest.raises(ModelContractError, match="answers otherwise on this processor"):
        open_copy(ModelStore(store).open(model_id), "float16", threads=1)


def test_a_copy_without_vectors_is_refused(model: StoredModel) -> None:
    with pytest.raises(ModelContractError, match="no vectors for int4"):
        check_golden(model, "int4", InferenceSession(model, threads=1).run)


def test_answers_that_are_no_numbers_are_refused(model: StoredModel) -> None:
    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(pixels), 8), np.nan), np.zeros((len(pixels), 512))

    with pytest.raises(ModelContractError, match="differs by nan"):
        check_golden(model, "float16", run)


@pytest.mark.parametrize("part", ["onnx_sha256", "temperature", "operating_points"])
def test_a_certificate_for_another_server_is_refused(
    model: StoredModel, altered: Callable[..., Path], model_id: str, part: str
) -> None:
    store = altered()
    path = store / model_id / EDGE_NAME
    content = json.loads(path.read_bytes())
    content["server"][part] = "another"
    replace(path, json.dumps(content).encode())
    seal(store / model_id)
    with pytest.raises(ModelContractError, match="another model or calibration"):
        list_copies(ModelStore(store).open(model_id))


def test_a_copy_that_the_manifest_does_not_vouch_for_is_refused(
    model: StoredModel, altered: Callable[..., Path], model_id: str
) -> None:
    store = altered()
    path = store / model_id / EDGE_NAME
    content = json.loads(path.read_bytes())
    content["copies"]["float16"]["file"] = "elsewhere.onnx"
    replace(path, json.dumps(content).encode())
    seal(store / model_id)
    with pytest.raises(ModelContractError, match=r"elsewhere\.onnx is not the file"):
        list_copies(ModelStore(store).open(model_id))
