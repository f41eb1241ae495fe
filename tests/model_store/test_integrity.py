"""A model is loaded only when every file is the one its manifest names."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
import os
from pathlib import Path

import numpy as np
import pytest

from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore, digest_file, model_digest
from model_store.session import PROVIDERS, InferenceSession
from serve_app.domain.errors import ModelContractError


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link: the original stays as it is
    path.write_bytes(content)


def test_every_model_of_the_store_loads_and_has_its_card(models: Path) -> None:
    store = ModelStore(models)
    for model_id in store:
        model = store.open(model_id)
        session = InferenceSession(model, threads=1)
        _, height, width = model.manifest.input.input_size
        logits, bottleneck = session.run(np.full((2, height, width, 3), 128, np.uint8))
        assert logits.shape == (2, 8)
        assert bottleneck.shape == (2, 512)
        assert np.isfinite(logits).all()
        assert np.isfinite(bottleneck).all()
        (card,) = (models / model_id).glob("*.md")
        assert model_id in card.read_text()


def test_a_missing_or_shortened_file_is_refused(altered, model_id: str) -> None:
    store = altered()
    path = store / model_id / "ood.npz"
    rewrite(path, path.read_bytes()[:-1])
    with pytest.raises(ModelContractError, match=r"ood\.npz"):
        ModelStore(store).open(model_id)
    path.unlink()
    with pytest.raises(ModelContractError, match="missing"):
        ModelStore(store).open(model_id)


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


def test_only_files_that_are_vouched_for_have_a_path(models: Path, model_id: str) -> None:
    model = ModelStore(models).open(model_id)
    assert model.path(model.manifest.onnx).is_file()
    for name in ("manifest.toml", "../x", "other.onnx"):
        with pytest.raises(ModelContractError):
            model.path(name)


def test_the_digest_is_of_everything(altered, models: Path, model_id: str) -> None:
    store = altered(lambda content: content["calibration"].update(temperature=1.75))
    assert ModelStore(store).open(model_id).digest != ModelStore(models).open(model_id).digest
    assert model_digest(store / model_id) == digest_file(store / model_id / MANIFEST_NAME)


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
    junk = b"this is no model"

    def change(content: dict) -> None:
        digest = {"bytes": len(junk), "sha256": sha256(junk).hexdigest()}
        content["files"][content["onnx"]] = digest

    store = altered(change)
    model_folder = store / model_id
    rewrite(next(model_folder.glob("*.onnx")), junk)
    model = ModelStore(store).open(model_id)
    with pytest.raises(ModelContractError, match="is no model"):
        InferenceSession(model, threads=1)


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
