"""EfficientNet-B4, five times the default's input and weights, answers over Ray without a redeployment."""

from __future__ import annotations

from dataclasses import replace
import time

import pytest

from data_jobs.references.load import publish_bundled
from data_jobs.training.recipe import read_recipe
from tests.random_model import POSITIONS, RECIPES, random_checkpoint, write_folder

pytest.importorskip("torch", reason="needs the train extra")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.torch,
    pytest.mark.timeout(300),
    # torch's ONNX tracer and its own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
async def b4(pms, node, model_id, isic_dir, tmp_path):
    """A B4 with random weights in the node's store; the model that answered before answers again after."""
    from data_jobs.training.export import export_weights

    recipe = replace(read_recipe(RECIPES / "efficientnet_b4.toml"), tag="random")
    weights = random_checkpoint(recipe.architecture, tmp_path / "b4.safetensors")
    export_weights(recipe, weights, POSITIONS, 380, tmp_path)
    write_folder(node.models, recipe, tmp_path, node.models / model_id, isic_dir)
    yield recipe.model_id
    await publish_bundled(node.urls.owner, node.models, model_id)


async def test_b4_takes_over_and_hands_back(pms, node, b4, model_id, lesion_image, capsys) -> None:
    patient = await pms.care()
    await publish_bundled(node.urls.owner, node.models, b4)
    answer = await _answer_of(pms, patient, lesion_image, b4)
    assert answer["outcome"] in {"decided", "review", "refused"}
    assert answer["provenance"]["embedding_space"].startswith(b4)
    if answer["outcome"] != "refused":
        assert sum(answer["classification"]["probabilities"].values()) == pytest.approx(1.0, abs=1e-6)
        assert answer["similar"]
    with capsys.disabled():
        print(f"\nB4 over Ray: {answer['timings_ms']}")
    await publish_bundled(node.urls.owner, node.models, model_id)
    await _answer_of(pms, patient, lesion_image, model_id)


async def _answer_of(pms, patient: str, lesion_image, wanted: str) -> dict:
    """The first answer of the wanted model; every answer before it is a whole one of the other."""
    deadline = time.monotonic() + 90
    seed = 0
    while True:
        response = await pms.upload(patient, lesion_image(seed))
        assert response.status_code == 201, response.text
        if response.json()["provenance"]["model_id"] == wanted:
            return response.json()
        assert time.monotonic() < deadline, "the model did not take over"
        seed += 1
