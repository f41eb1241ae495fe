"""One forward pass: alone, in company, from many threads, and whatever the order of the labels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import hashlib
from pathlib import Path
from threading import Event
import tomllib

import numpy as np
import pytest

from deployments.classifier.classifier import Classifier
from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.errors import ModelContractError
from serve_app.records.serving import LiveModel
from tests.model_folders import copy_model, rewrite


@pytest.fixture(scope="module")
def classifier(models: Path, model_id: str) -> Classifier:
    classifier = Classifier(ModelStore(models), threads=1)
    classifier.load(model_id)
    return classifier


@pytest.fixture(scope="module")
def pixels(model: StoredModel) -> list[np.ndarray]:
    """Eight different pictures of the model's input size."""
    _, height, width = model.manifest.input.input_size
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    pictures = []
    for seed in range(8):
        random = np.random.default_rng(seed)
        blotch = np.exp(-((x - 0.5) ** 2 + (y - 0.4) ** 2) * (8 + 4 * seed))[..., None]
        picture = 200 - blotch * random.uniform(60, 150, 3) + random.normal(0, 6, (height, width, 3))
        pictures.append(np.clip(picture, 0, 255).astype(np.uint8))
    return pictures


def values(output) -> np.ndarray:
    return np.array([*output.classification.probabilities.values(), output.classification.ood_score])


def test_a_batch_is_as_good_as_one_by_one(
    classifier: Classifier, models: Path, model_id: str, pixels
) -> None:
    alone = [classifier.classify(model_id, [picture])[0] for picture in pixels[:4]]
    together = classifier.classify(model_id, pixels[:4])
    for one, other in zip(alone, together, strict=True):
        found, expected = (np.array(list(o.classification.probabilities.values())) for o in (other, one))
        assert np.abs(found - expected).max() <= 1e-6
        assert np.allclose(other.bottleneck, one.bottleneck, rtol=1e-4, atol=1e-4)
        assert other.classification.prediction_set == one.classification.prediction_set
        digest = ModelStore(models).open(model_id).digest
        assert (one.model_id, one.model_digest, one.bottleneck.dtype) == (model_id, digest, np.float32)
    with pytest.raises(ModelContractError):
        classifier.classify("nobody.here", pixels[:1])


def test_threads_do_not_mix_their_answers(classifier: Classifier, model_id: str, pixels) -> None:
    expected = [values(classifier.classify(model_id, [picture])[0]) for picture in pixels]
    with ThreadPoolExecutor(6) as threads:
        jobs = [i % len(pixels) for i in range(24)]
        found = list(threads.map(lambda i: values(classifier.classify(model_id, [pixels[i]])[0]), jobs))
    for i, value in zip(jobs, found, strict=True):
        assert np.allclose(value, expected[i], rtol=0, atol=1e-6)


class _HeldStore(ModelStore):
    """A store whose new model takes until the test says so to verify."""

    def __init__(self, root: Path, held: str) -> None:
        super().__init__(root)
        self.held, self.reached, self.go = held, Event(), Event()

    def open(self, model_id: str) -> StoredModel:
        if model_id == self.held:
            self.reached.set()
            self.go.wait(60)
        return super().open(model_id)


def test_the_live_model_answers_while_another_is_built(models, model_id, pixels, tmp_path) -> None:
    copy_model(models / model_id, tmp_path)
    other = copy_model(models / model_id, tmp_path, "next")
    store = _HeldStore(tmp_path, other)
    classifier = Classifier(store, threads=1)
    classifier.load(model_id)
    with ThreadPoolExecutor(3) as threads:
        try:
            building = [threads.submit(classifier.load, other) for _ in range(2)]
            assert store.reached.wait(30)
            (answer,) = threads.submit(classifier.classify, model_id, pixels[:1]).result(timeout=30)
            assert answer.model_id == model_id
            assert not any(future.done() for future in building)
        finally:
            store.go.set()
        for future in building:
            future.result()


def test_replays_of_old_models_do_not_fill_the_memory(models, model_id, pixels, tmp_path) -> None:
    """At most three stay; the live one and the candidate are never the ones that go."""
    copy_model(models / model_id, tmp_path)
    tags = ("candidate", "old1", "old2", "old3")
    candidate, *old = (copy_model(models / model_id, tmp_path, tag) for tag in tags)
    classifier = Classifier(ModelStore(tmp_path), threads=1)
    held = [_answering(tmp_path, name) for name in (model_id, candidate)]
    digests = classifier.warm(held)
    assert digests == {model.model_id: model.model_digest for model in held}
    for name in old:
        (answer,) = classifier.classify(name, pixels[:1])
        assert answer.model_id == name
        assert [name for name in (model_id, candidate, *old) if name in classifier] == [
            *(model_id, candidate),
            name,
        ]
    # Told of others, it may let go of what was the candidate.
    classifier.warm(held[:1])
    for name in old[:2]:
        classifier.load(name)
    assert model_id in classifier
    assert candidate not in classifier


def _answering(store: Path, model_id: str) -> LiveModel:
    model = ModelStore(store).open(model_id)
    return LiveModel(model_id, model.digest, model.manifest.live_space.embedding_space)


@pytest.mark.torch
def test_the_order_of_the_labels_is_the_models_own_affair(
    classifier: Classifier, models: Path, model_id: str, pixels, tmp_path: Path
) -> None:
    """Permute the graph's logits and the label space alike: the answer stays as it is."""
    import onnx

    source = models / model_id
    content = tomllib.loads((source / MANIFEST_NAME).read_text())
    permutation = np.array([3, 0, 7, 5, 1, 6, 2, 4])
    graph = onnx.load(source / content["onnx"])
    name = content["output"]["logits"]
    for node in graph.graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = "logits_before"
    indices = onnx.numpy_helper.from_array(permutation.astype(np.int64), "permutation")
    graph.graph.initializer.append(indices)
    gather = onnx.helper.make_node("Gather", ["logits_before", "permutation"], [name], axis=1)
    graph.graph.node.append(gather)
    stated = [content["output"]["label_space"][i] for i in permutation]
    onnx.helper.set_model_props(graph, {"label_space": ",".join(stated)})
    content["output"]["label_space"] = stated
    served = graph.SerializeToString()
    content["files"][content["onnx"]] = {"bytes": len(served), "sha256": hashlib.sha256(served).hexdigest()}
    copy_model(source, tmp_path, change=lambda manifest: manifest.update(content))
    rewrite(tmp_path / model_id / content["onnx"], served)
    found = Classifier(ModelStore(tmp_path), threads=1).classify(model_id, pixels[:3])
    expected = classifier.classify(model_id, pixels[:3])
    for new, old in zip(found, expected, strict=True):
        assert values(new) == pytest.approx(values(old), abs=1e-6)
        assert new.classification.prediction_set == old.classification.prediction_set
