"""Export weights that come as safetensors: `python -m data_jobs.training.timm_checkpoint`.

Takes our own network's tensors, or those of a timm classifier of the recipe's architecture. The
latter has no 512-wide layer; it gets one that changes none of its logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import json
from pathlib import Path
import sys
from typing import Any

import numpy as np
from safetensors.torch import load_file
import timm
import torch
from torch import Tensor

from data_jobs.training.export import OPSET, onnx_parity, write_onnx
from data_jobs.training.network import DermNetwork, first_lines, load_trunk
from data_jobs.training.recipe import Recipe, read_recipe
from model_store.manifest import EMBEDDING_DIM

SAMPLED = 4
_SEED = 512


def bottleneck_basis(weight: Tensor) -> Tensor:
    """512 orthonormal rows over the W pooled features, the first of which span a classifier's rows (C×W).

    All that the classifier looks at is kept; of the rest a random projection, which keeps
    distances about as they are (Johnson and Lindenstrauss 1984). Equal for equal weights.
    """
    classes, width = weight.shape
    random = torch.randn(width, EMBEDDING_DIM - classes, generator=torch.Generator().manual_seed(_SEED))
    rows, _ = torch.linalg.qr(torch.cat([weight.T.double(), random.double()], dim=1))
    return rows.T.float()


def adopt_classifier(recipe: Recipe, state: Mapping[str, Tensor], positions: list[int]) -> DermNetwork:
    """Our network with a timm classifier's weights: the same logits, of the labels at `positions`.

    Raises ValueError when the tensors are not those of the recipe's architecture.
    """
    network = DermNetwork(recipe.architecture, recipe.network)
    load_trunk(network, recipe.architecture, state)
    weight, bias = state["classifier.weight"][positions], state["classifier.bias"][positions]
    basis = bottleneck_basis(weight)
    normalise = network.normalise
    with torch.no_grad():
        network.reduce.weight.copy_(basis)
        network.classify.weight.copy_((weight.double() @ basis.double().T).float())
        network.classify.bias.copy_(bias)
        # The identity: mean 0, variance 1, and a weight that undoes epsilon.
        normalise.weight.fill_((1.0 + normalise.eps) ** 0.5)
    return network.eval()


def load_own(recipe: Recipe, state: Mapping[str, Tensor]) -> DermNetwork:
    """Our network from its own tensors; ValueError when they are another architecture's."""
    network = DermNetwork(recipe.architecture, recipe.network)
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(
            f"These are not the weights of {recipe.architecture}: {first_lines(error)}"
        ) from error
    return network.eval()


@torch.inference_mode()
def classifier_difference(
    recipe: Recipe, state: Mapping[str, Tensor], positions: list[int], network: DermNetwork, side: int
) -> float:
    """Largest difference between the logits of timm's own model and our network's, on random pixels."""
    original = timm.create_model(
        recipe.architecture, pretrained=False, num_classes=state["classifier.weight"].shape[0]
    )
    original.load_state_dict(dict(state))
    pixels = torch.randint(
        0, 256, (SAMPLED, 3, side, side), generator=torch.Generator().manual_seed(_SEED)
    ).float()
    normalised = (pixels - network.mean) / network.std
    expected = original.eval()(normalised)[:, positions]
    return float((network(pixels)[0] - expected).abs().max())


def export(recipe: Recipe, weights: Path, positions: list[int], side: int, output: Path) -> dict[str, Any]:
    """Write model.onnx and export.json, and return the latter; ValueError for weights of another network."""
    state = load_file(weights)
    report: dict[str, Any] = {"model_id": recipe.model_id, "side": side, "source": "safetensors"}
    network: DermNetwork
    if "classifier.weight" in state:
        network = adopt_classifier(recipe, state, positions)
        report["max_abs_logit_of_timm"] = classifier_difference(recipe, state, positions, network, side)
    else:
        network = load_own(recipe, state)
    path = output / "model.onnx"
    write_onnx(network, side, path)
    pixels = np.random.default_rng(_SEED).integers(0, 256, (SAMPLED, side, side, 3)).astype(np.uint8)
    report |= {"opset": OPSET, "parity": onnx_parity(network, path, pixels), "sides": [{"side": side}]}
    (output / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> int:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--positions", type=json.loads, required=True, help="of the eight among the logits")
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    try:
        report = export(recipe, arguments.weights, arguments.positions, arguments.side, arguments.output)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(report["parity"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
