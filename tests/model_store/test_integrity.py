"""A model is loaded only when every file is the one its manifest names; while one is refused, the live one goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from data_jobs.training.manifest_file import seal
from deployments.classifier.calibration import Calibrator
from deployments.classifier.classifier import Classifier
from deployments.embedder.embedder import Embedder
from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore, StoredModel, digest_file, verify_files
from model_store.session import PROVIDERS, InferenceSession
from serve_app.domain.errors import ModelContractError
from tests.model_folders import copy_model, rewrite


def test_every_model_of_the_store_loads_and_has_its_card(models: Path) -> None:
    store = ModelStore(models)
    for model_id in store:
        model = store.open(model_id)
        session = InferenceSession(model, threads=1)
        _, height, width = model.manifest.input.input_size
        outputs = session.run(np.full((2, height, width, 3), 128, np.uint8))
        logits, bottleneck, *_ = outputs
        for answer in Calibrator.from_model(model).classify(outputs):
            assert sum(answer.probabilities.values()) == pytest.approx(1.0)
            assert (answer.disagreement is None) == (model.manifest.output.members == 1)
        assert logits.shape == (2, 8)
        assert bottleneck.shape == (2, 512)
        assert np.isfinite(logits).all()
        assert np.isfinite(bottleneck).all()
        (card,) = (models / model_id).glob("*.md")
        assert model_id in card.read_text()


@pytest.fixture
def beside(altered, model_id: str) -> tuple[Path, str]:
    """A copy of the live model beside it under another name: the store, and the name."""
    store = altered()
    return store, copy_model(store / model_id, store, "tampered")


def test_one_bit_of_any_file_or_its_absence_is_refused(beside, models: Path, model_id: str) -> None:
    store, other = beside
    live = ModelStore(store).open(model_id)
    assert len(live.manifest.files) >= 4
    for name in live.manifest.files:
        path = store / other / name
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        rewrite(path, bytes(changed))
        manifest = replace(live.manifest, files={name: live.manifest.files[name]})
        with pytest.raises(ModelContractError, match=f"{name} is not the file its manifest names"):
            verify_files(store / other, manifest.files)
        path.unlink()
        with pytest.raises(ModelContractError, match="missing"):
            verify_files(store / other, manifest.files)
        path.write_bytes(whole)
    assert ModelStore(store).open(other)


@pytest.mark.parametrize("kept", [0.0, 0.999])
def test_a_truncated_graph_is_refused_and_the_live_model_goes_on(beside, model_id: str, kept: float) -> None:
    """In one process, as in a replica: before, during and after."""
    store, other = beside
    path = store / other / "model.onnx"
    whole = path.read_bytes()
    rewrite(path, whole[: int(kept * len(whole))])
    models = ModelStore(store)
    classifier, embedder = Classifier(models, threads=1), Embedder(models)
    manifest = models.open(model_id).manifest
    side, space = manifest.input.input_size[1], manifest.live_space.embedding_space
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    (before,) = classifier.classify(model_id, [image])
    for _ in range(2):  # and again: a refusal is not forgotten
        with pytest.raises(ModelContractError, match=r"model\.onnx is not the file"):
            classifier.classify(other, [image])
    with pytest.raises(ModelContractError, match=r"model\.onnx is not the file"):
        embedder.load(other, space)
    (after,) = classifier.classify(model_id, [image])
    assert after.classification == before.classification
    assert np.array_equal(
        embedder.embed(model_id, space, after.bottleneck), embedder.embed(model_id, space, before.bottleneck)
    )


def test_labels_in_another_order_than_the_graphs_own_are_refused(altered, model_id: str) -> None:
    """One to one, complete, each digest right, and every diagnosis another's: only the graph's own words tell."""

    def change(content: dict) -> None:
        labels = content["output"]["label_space"]
        content["output"]["label_space"] = [labels[i] for i in (3, 0, 7, 5, 1, 6, 2, 4)]

    with pytest.raises(ModelContractError, match=r"model\.onnx gives its logits as MEL,NV,.*its manifest as"):
        InferenceSession(ModelStore(altered(change)).open(model_id), threads=1)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/inside", ".."])
def test_a_file_outside_of_the_folder_is_refused(altered, model_id: str, name: str) -> None:
    def change(content: dict) -> None:
        content["files"][name] = {"bytes": 7, "sha256": sha256(b"outside").hexdigest()}

    store = altered(change)
    (store / "outside").write_bytes(b"outside")  # a true digest helps nothing
    with pytest.raises(ModelContractError, match="outside the model folder"):
        ModelStore(store).open(model_id)


@pytest.mark.parametrize("model_id", ["", "..", "../x", "no_dot", "A.b", "nobody.here", "a.b\n"])
def test_an_unknown_model_is_refused(models: Path, model_id: str) -> None:
    with pytest.raises(ModelContractError):
        ModelStore(models).open(model_id)


def test_a_folder_that_holds_another_model_is_refused(altered, model_id: str) -> None:
    store = altered()
    (store / model_id).rename(store / "another.name")
    with pytest.raises(ModelContractError, match="holds"):
        ModelStore(store).open("another.name")


def test_only_files_that_are_vouched_for_have_a_path(model: StoredModel) -> None:
    assert model.path(model.manifest.onnx).is_file()
    for name in ("manifest.toml", "../x", "other.onnx"):
        with pytest.raises(ModelContractError):
            model.path(name)


def test_the_digest_is_of_everything(altered, models: Path, model_id: str) -> None:
    store = altered(lambda content: content["calibration"].update(temperature=1.75))
    digest = ModelStore(store).open(model_id).digest
    assert digest == digest_file(store / model_id / MANIFEST_NAME)
    assert digest != ModelStore(models).open(model_id).digest


def test_a_model_is_had_while_another_is_verified(models: Path, model_id: str, tmp_path: Path) -> None:
    (tmp_path / model_id).symlink_to(models / model_id)
    slow = tmp_path / "slow.one" / MANIFEST_NAME
    slow.parent.mkdir()
    os.mkfifo(slow)  # whoever reads it waits for whoever writes it
    store = ModelStore(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        verifying = threads.submit(store.open, "slow.one")
        try:
            with slow.open("w") as manifest:  # opens as soon as the store reads
                model = threads.submit(store.open, model_id).result(timeout=30)
                assert store.open(model_id) is model  # verified once
                assert not verifying.done()
                manifest.write("no manifest")
        finally:
            assert isinstance(verifying.exception(), ModelContractError)


def test_onnx_that_is_none_is_refused_although_its_digest_is_true(altered, model_id: str) -> None:
    store = altered()
    rewrite(store / model_id / "model.onnx", b"this is no model")
    seal(store / model_id)
    with pytest.raises(ModelContractError, match="is no model"):
        InferenceSession(ModelStore(store).open(model_id), threads=1)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("input", "name", "pictures"),
        ("input", "input_size", [3, 64, 64]),
        ("output", "logits", "scores"),
        ("output", "bottleneck", "logits"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    altered, model_id: str, section: str, key: str, value: object
) -> None:
    store = altered(lambda content: content[section].update({key: value}))
    model = ModelStore(store).open(model_id)
    with pytest.raises(ModelContractError, match="its manifest says"):
        InferenceSession(model, threads=1)


def test_cuda_without_a_gpu_build_is_refused(
    models: Path, model_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ModelContractError, match="gpu"):
        InferenceSession(ModelStore(models).open(model_id), threads=1, device="cuda")
    assert PROVIDERS["cuda"][1] == {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}


_RUN = """
import data_jobs.training.scan
from pathlib import Path
import sys
import numpy as np
from model_store.registry import ModelStore
from model_store.session import InferenceSession
store = ModelStore(Path(sys.argv[1]))
model = store.open(sys.argv[2])
side = model.manifest.input.input_size[1]
InferenceSession(model, threads=1).run(np.zeros((1, side, side, 3), np.uint8))
"""


def test_a_session_leaves_nothing_in_the_home_folder(tmp_path: Path, models: Path, model_id: str) -> None:
    """Whichever module comes first, a job's, too."""
    home = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME")}
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-B", "-c", _RUN, str(models), model_id]
    subprocess.run(command, env=kept | home, check=True, cwd=Path(__file__).parents[2])
    assert list(tmp_path.rglob("*")) == []
