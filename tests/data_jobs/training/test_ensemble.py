"""Networks that each left out a fold, as one graph: what it gives, and which images each part is judged on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import save_file
import torch

from data_jobs.training.dataset import LabelledImage
from data_jobs.training.edge.onnx_copies import write_float16
from data_jobs.training.ensemble import Ensemble, read_ensemble
from data_jobs.training.ensemble_network import EnsembleNetwork, load_members
from data_jobs.training.export import PixelsIn, onnx_parity, write_onnx
from data_jobs.training.network import DermNetwork
from data_jobs.training.recipe import read_recipe
from data_jobs.training.restore import restore
from data_jobs.training.scan import open_onnx
from data_jobs.training.unknown import Examples, UnknownHead, fit_head
from data_jobs.training.unknown_heads import measure

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
RECIPES = Path("data_jobs/training/recipes")
SIDE = 64


def network(seed: int) -> DermNetwork:
    torch.manual_seed(seed)
    plan = read_recipe(RECIPES / "tf_efficientnet_lite0_derm7.toml").network
    made = DermNetwork("tf_efficientnet_lite0", plan).eval()
    with torch.no_grad():
        # As after training: a normalisation that does something.
        for norm in (m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d)):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.8, 1.2)
            norm.bias.uniform_(-0.1, 0.1)
    return made


def some_head(measures: np.ndarray) -> UnknownHead:
    """Of what is near these measures, against twice as much."""
    rng = np.random.default_rng(2)
    near = np.repeat(measures, 8, axis=0) * rng.normal(1.0, 0.1, (8 * len(measures), measures.shape[1]))
    names = np.arange(len(near)).astype(str)
    return fit_head(Examples(near, names, names), Examples(2.0 * near, names, names))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (6, SIDE, SIDE, 3)).astype(np.uint8)


@pytest.mark.parametrize("members", [1, 2])
def test_one_graph_gives_every_member_their_mean_and_one_bottleneck(
    members: int, pixels: np.ndarray, tmp_path: Path
) -> None:
    networks = [network(seed) for seed in range(members)]
    heads = [some_head(measure(one, pixels)) for one in networks]
    whole = EnsembleNetwork(networks, heads).eval()
    features = np.random.default_rng(1).normal(size=(1500, 512 * members)).astype(np.float32)
    assert 0 < whole.fit_bottleneck(features) <= 1
    served, path = (
        PixelsIn(whole, whole.outputs),
        tmp_path / "model.onnx",
    )
    write_onnx(served, SIDE, path)
    size = path.stat().st_size
    write_float16(onnx.load(path), path)
    assert path.stat().st_size < 0.6 * size
    assert onnx_parity(served, path, pixels)["max_abs_logit"] < 0.02, "half floats round the weights alone"
    found = open_onnx(path)(pixels)
    logits = found.logits[:, None] if found.members is None else found.members
    assert logits.shape == (6, members, 8)
    assert np.allclose(found.logits, logits.mean(1), atol=1e-5)
    assert found.bottleneck.shape == (6, 512)
    scores = [head.score(measure(one, pixels)) for head, one in zip(heads, networks, strict=True)]
    assert found.unknown == pytest.approx(np.mean(scores, axis=0), abs=0.2)
    for k, one in enumerate(networks):
        with torch.no_grad():
            alone = one(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
        assert np.abs(logits[:, k] - alone[0].numpy()).max() < 0.02
        if members == 1:
            assert np.abs(found.bottleneck - alone[1].numpy()).max() < 0.1


def test_a_graph_becomes_trainable_again_and_answers_as_before(pixels: np.ndarray, tmp_path: Path) -> None:
    write_onnx(PixelsIn(network(3)), SIDE, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    restored = restore(network(4), graph, pixels)
    with torch.no_grad():
        logits, bottleneck = restored(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))
    expected = open_onnx(tmp_path / "model.onnx")(pixels)
    assert np.abs(logits.numpy() - expected.logits).max() < 1e-4
    assert np.abs(bottleneck.numpy() - expected.bottleneck).max() < 1e-3
    # Its normalisations know what comes in, so that a training step starts from the same answers.
    restored.train()
    restored.dropout.eval()
    found = []
    restored.trunk.conv_head.register_forward_hook(lambda _m, _i, out: found.append(out))
    with torch.no_grad():
        restored.trunk(torch.from_numpy(pixels).float().permute(0, 3, 1, 2) / 255.0)
    assert np.isfinite(found[0].numpy()).all()


def test_every_part_is_judged_on_images_it_has_not_seen(make_row: Callable[..., LabelledImage]) -> None:
    plan = read_recipe(RECIPES / "tf_efficientnet_lite2_derm10.toml")
    rows = [replace(make_row(i, i // 2 % 8), fold=i // 2 % 5) for i in range(4000)]
    both = Ensemble("two", "x", 1, (plan.member(1), plan.member(4)))
    assert [both.member_of([replace(rows[0], fold=fold)])[0] for fold in range(5)] == [-1, 0, -1, -1, 1]
    unseen = {rows[i].fold for i in both.unseen(rows)}
    # Fold 1 is left out by the first only: of it, no member has seen the reserve, and so of fold 4.
    assert unseen == {1, 4}
    assert 0 < len(both.unseen(rows)) < 0.3 * sum(row.fold in {1, 4} for row in rows)
    assert len(Ensemble.of(plan.member(1)).unseen(rows)) == 800, "one network: its whole fold"


def test_weights_that_are_not_the_named_ones_are_refused(tmp_path: Path) -> None:
    recipe = RECIPES / "tf_efficientnet_lite2_derm10.toml"
    text = f'architecture = "two"\ntag = "x"\nseed = 1\nside = {SIDE}\n'
    text += f'[[members]]\nrecipe = "{recipe.resolve()}"\nleft_out = 1\nweights_sha256 = "SHA"\n'
    torch.manual_seed(1)
    plan = read_recipe(recipe)
    path = tmp_path / "member.safetensors"
    save_file(
        {k: v.half() for k, v in DermNetwork(plan.architecture, plan.network).state_dict().items()}, path
    )
    (tmp_path / "e.toml").write_text(text.replace("SHA", hashlib.sha256(path.read_bytes()).hexdigest()))
    (loaded,) = load_members(read_ensemble(tmp_path / "e.toml"), [path])
    assert loaded.classify.weight.dtype == torch.float32
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(ValueError, match="SHA-256 is another"):
        load_members(read_ensemble(tmp_path / "e.toml"), [path])
    (tmp_path / "e.toml").write_text(text + text[text.index("[[") :])
    with pytest.raises(ValueError, match="left out one fold"):
        read_ensemble(tmp_path / "e.toml")
