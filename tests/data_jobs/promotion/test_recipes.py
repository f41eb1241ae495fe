"""Seeded random weights, made here, from a timm checkpoint or our own network to a served graph."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.baseline import LocalStages
from data_jobs.promotion.source import MAX_LOGIT_DIFFERENCE
from data_jobs.references.load import publish_bundled
from data_jobs.training.recipe import read_recipe
from deployments.preprocess.decode import UploadLimits
from serve_app.domain.assessment import EVERY_REFERENCE, Outcome
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.patient import ClinicalContext
from serve_app.lesions.assess import Assessor
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import live_model
from tests.random_model import POSITIONS, RECIPES, random_checkpoint, write_folder

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("timm", reason="needs the train extra")
pytest.importorskip("safetensors", reason="needs the train extra")
pytest.importorskip("onnx", reason="needs the train extra")

pytestmark = [
    pytest.mark.torch,
    # torch's ONNX tracer and its own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]


def test_a_timm_checkpoint_keeps_its_logits(tmp_path: Path) -> None:
    from data_jobs.training.export import bottleneck_basis, export_weights

    recipe = read_recipe(RECIPES / "mobilenetv3_large_100.toml")
    weights = random_checkpoint(recipe.architecture, tmp_path / "model.safetensors")
    report = export_weights(recipe, weights, POSITIONS, 64, tmp_path)
    assert report["parity"]["max_abs_logit"] < MAX_LOGIT_DIFFERENCE
    assert report["max_abs_logit_of_timm"] < MAX_LOGIT_DIFFERENCE
    basis = bottleneck_basis(torch.randn(8, 1280)).double()
    assert torch.allclose(basis @ basis.T, torch.eye(512, dtype=torch.float64), atol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    from data_jobs.training.export import export_weights

    recipe = read_recipe(RECIPES / "mobilenetv3_large_100.toml")
    weights = random_checkpoint("tf_efficientnet_lite0", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not the weights of mobilenetv3_large_100"):
        export_weights(recipe, weights, POSITIONS, 64, tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_our_own_network_comes_back_from_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from data_jobs.training.export import export_weights
    from data_jobs.training.network import DermNetwork

    recipe = read_recipe(RECIPES / "mobilenetv3_large_100.toml")
    torch.manual_seed(5)
    network = DermNetwork(recipe.architecture, recipe.network).eval()
    # Mean and std are the recipe's, one a channel, and no part of a checkpoint.
    assert not {"mean", "std"} & set(network.state_dict())
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    assert (
        export_weights(recipe, tmp_path / "own.safetensors", list(range(8)), 64, tmp_path)["parity"][
            "max_abs_logit"
        ]
        < 1e-4
    )
    pixels = torch.randint(0, 256, (2, 3, 64, 64)).float()
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (recipe.network.mean, recipe.network.std))
    pooled = network.trunk((pixels - mean) / std)
    assert pooled.shape == (2, 1280)
    assert torch.allclose(network(pixels)[1], network.normalise(network.reduce(pooled)), atol=1e-5)


async def test_another_network_answers_through_the_whole_graph(
    tmp_path: Path, new_database, models: Path, model_id: str, isic_dir: Path
) -> None:
    """All five stages on a real image, with real references in a real database, by another trunk and input size."""
    from data_jobs.training.export import export_weights

    recipe = replace(read_recipe(RECIPES / "mobilenetv3_large_100.toml"), tag="random")
    exported, store = tmp_path / "export", tmp_path / "models"
    exported.mkdir()
    export_weights(
        recipe, random_checkpoint(recipe.architecture, tmp_path / "w.safetensors"), POSITIONS, 224, exported
    )
    write_folder(store, recipe, exported, models / model_id, isic_dir)
    urls = await new_database()
    await publish_bundled(urls.owner, store, recipe.model_id)
    async with AsyncExitStack() as stack:
        pool = await open_pool(urls.app, minimum=0, maximum=2, timeout_s=20)
        stack.push_async_callback(pool.close)
        live = await live_model(pool)
        assert live is not None
        stages = LocalStages(
            models=store,
            references=ReferenceStore(pool),
            limits=UploadLimits(),
            threads=1,
            policy_version="2026-11.4",
        )
        assessor = Assessor(stages, service_version="test")
        image = min((isic_dir / "uploads").iterdir()).read_bytes()
        examination = await assessor.examine(image, live)
        assert examination.prepared.pixels.shape == (224, 224, 3)
        case = SimpleNamespace(context=ClinicalContext(), top_k=3, reference_filter=EVERY_REFERENCE)
        answer = await assessor.assess(examination, case, previous=None)
    assert answer.outcome in {Outcome.DECIDED, Outcome.REVIEW}
    assert answer.provenance.model_id == "mobilenetv3_large_100.random"
    assert answer.classification is not None
    assert set(answer.classification.probabilities) == set(Diagnosis)
    assert sum(answer.classification.probabilities.values()) == pytest.approx(1.0)
    assert answer.neighbours is not None
    assert len(answer.similar) == 3
    assert answer.risk is not None
