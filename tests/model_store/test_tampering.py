"""Whatever is done to a candidate's folder, it is refused with its reason, and the live model goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.manifest_file import seal
from deployments.classifier.classifier import Classifier
from deployments.embedder.embedder import Embedder
from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore, verify_files
from serve_app.domain.diagnosis import TRAINED
from serve_app.domain.errors import ModelContractError

from .test_integrity import rewrite

TAG = "tampered"


@pytest.fixture
def beside(altered, model_id: str):
    """Put a copy of the live model beside it under another name; `() -> (store, name)`."""

    def make() -> tuple[Path, str]:
        store = altered()
        architecture = model_id.partition(".")[0]
        other = f"{architecture}.{TAG}"
        folder = store / other
        folder.mkdir()
        for path in (store / model_id).iterdir():
            (folder / path.name).hardlink_to(path)
        text = (folder / MANIFEST_NAME).read_text()
        text = text.replace(f'model_id = "{model_id}"', f'model_id = "{other}"')
        text = text.replace(f'tag = "{model_id.partition(".")[2]}"', f'tag = "{TAG}"')
        rewrite(folder / MANIFEST_NAME, text.encode())
        return store, other

    return make


def assert_live_goes_on(store: Path, live: str, other: str, message: str) -> None:
    """One process, as in a replica: the live model before, during and after a refused candidate."""
    models = ModelStore(store)
    classifier, embedder = Classifier(models, threads=1), Embedder(models)
    side = models.open(live).manifest.input.input_size[1]
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    space = models.open(live).manifest.live_space.embedding_space
    (before,) = classifier.classify(live, [image])
    for _ in range(2):  # and again: a refusal is not forgotten
        with pytest.raises(ModelContractError, match=message):
            classifier.classify(other, [image])
    with pytest.raises(ModelContractError, match=message):
        embedder.load(other, space)
    (after,) = classifier.classify(live, [image])
    assert after.classification == before.classification
    assert np.array_equal(
        embedder.embed(live, space, after.bottleneck), embedder.embed(live, space, before.bottleneck)
    )


def test_one_bit_of_any_file_is_refused(beside, models: Path, model_id: str) -> None:
    """Every file, whatever the folder holds."""
    store, other = beside()
    live = ModelStore(store).open(model_id)
    checked = 0
    for name in live.manifest.files:
        path = store / other / name
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        rewrite(path, bytes(changed))
        with pytest.raises(ModelContractError, match=f"{name} is not the file its manifest names"):
            verify_files(store / other, replace(live.manifest, files={name: live.manifest.files[name]}))
        checked += 1
        rewrite(path, whole)
    assert checked >= 4
    assert ModelStore(store).open(other)


@pytest.mark.parametrize("kept", [0.0, 0.999])
def test_a_truncated_graph_is_refused_and_the_live_model_goes_on(beside, model_id: str, kept: float) -> None:
    store, other = beside()
    path = store / other / "model.onnx"
    whole = path.read_bytes()
    rewrite(path, whole[: int(kept * len(whole))])
    assert_live_goes_on(store, model_id, other, "model.onnx is not the file")


def _with_labels(content: bytes, labels: str) -> bytes:
    """Append a metadata entry to a ModelProto: field 14 is repeated, so that it may stand at the end."""
    pair = b"\x0a\x0blabel_space\x12" + bytes([len(labels)]) + labels.encode()
    return content + b"\x72" + bytes([len(pair)]) + pair


@pytest.mark.parametrize("swap", [False, True])
def test_labels_in_another_order_than_the_graphs_own_are_refused(
    beside, model_id: str, *, swap: bool
) -> None:
    """One to one and complete, so that no other rule can tell; every answer would be wrong."""
    store, other = beside()
    folder = store / other
    path = folder / "model.onnx"
    rewrite(path, _with_labels(path.read_bytes(), ",".join(TRAINED)))
    manifest = folder / MANIFEST_NAME
    if swap:
        text = manifest.read_text().replace('"MEL",\n    "NV",', '"NV",\n    "MEL",', 1)
        rewrite(manifest, text.encode())
    seal(folder)
    classifier = Classifier(ModelStore(store), threads=1)
    classifier.load(model_id)
    if not swap:
        classifier.load(other)
        return
    with pytest.raises(ModelContractError, match=r"gives its logits as MEL,NV,.*its manifest as NV,MEL,"):
        classifier.load(other)
    side = ModelStore(store).open(model_id).manifest.input.input_size[1]
    assert classifier.classify(model_id, [np.zeros((side, side, 3), np.uint8)])
