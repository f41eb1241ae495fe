"""Make a shipped graph trainable again, and go part of the way: `python -m data_jobs.training.restore`.

`graph --model M --recipe R --output C`. An export folds every batch normalisation of the trunk into the convolution before it, and the checkpoint it was made
from is not shipped. This puts the normalisations back: with the statistics that the folded convolution's own outputs
have on images of the recipe's training folds, and the scale and shift that undo them, so that the network answers as
the graph does. `C` is a checkpoint that a recipe's `[start]` may name.

`blend --start C --weights W --share S --output B`. What a run that started there came to, `W`, may know more and have
lost some of what it knew: the weights (1 - S) * C + S * W often have most of both (Wortsman et al., "Robust fine-tuning
of zero-shot models", CVPR 2022). `--model M` and its `--recipe` take out of `C` the share of the prior that M's export
restored, which `W` is still to get.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import onnx
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
import torch
from torch import Tensor, nn

from data_jobs.training.dataset import isic_folder, labels_of, load_pixels, read_rows, training_indices
from data_jobs.training.network import DermNetwork, averaged_weights
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.scan import open_onnx
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore
from serve_app.domain.diagnosis import TRAINED

#: Images that the statistics are taken of, and how many at a time.
SAMPLED = 512
_BATCH = 64


@torch.no_grad()
def restore(network: DermNetwork, graph: onnx.ModelProto, pixels: NDArray[np.uint8]) -> DermNetwork:
    """Give the network the graph's weights; uint8 pixels N×S×S×3 set the statistics of its normalisations.

    Raises ValueError when the graph is not one of this network.
    """
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.graph.initializer}
    folded = [node for node in graph.graph.node if node.op_type == "Conv"]
    layers = [m for m in network.trunk.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    if not len(folded) == len(layers) == len(norms):
        raise ValueError(f"The graph has {len(folded)} convolutions, the network {len(layers)}.")
    for node, convolution, norm in zip(folded, layers, norms, strict=True):
        weight, bias = (tensors[name] for name in node.input[1:])
        if weight.shape != convolution.weight.shape:
            raise ValueError(f"{node.name}: {tuple(weight.shape)} is not {tuple(convolution.weight.shape)}.")
        convolution.weight.copy_(weight)
        # The identity but for the bias, until the statistics are known.
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(bias + norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt())
    head = {name.removeprefix("network."): value for name, value in tensors.items()}
    network.reduce.weight.copy_(_matrix(graph, tensors).T)
    for name in ("normalise.weight", "normalise.bias", "normalise.running_mean", "normalise.running_var"):
        network.state_dict()[name].copy_(head[name])
    network.classify.weight.copy_(head["classify.weight"])
    network.classify.bias.copy_(head["classify.bias"])
    _set_statistics(network.eval(), layers, norms, pixels)
    return network


def _matrix(graph: onnx.ModelProto, tensors: dict[str, Tensor]) -> Tensor:
    (node,) = (node for node in graph.graph.node if node.op_type == "MatMul")
    return tensors[node.input[1]]


def _set_statistics(
    network: DermNetwork, layers: list[nn.Conv2d], norms: list[nn.BatchNorm2d], pixels: NDArray[np.uint8]
) -> None:
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms]
    counts = [0] * len(norms)

    def remember(place: int, found: Tensor) -> None:
        values = found.double().transpose(0, 1).flatten(1)
        sums[place] += torch.stack([values.sum(1), (values**2).sum(1)])
        counts[place] += values.shape[1]

    hooks = [
        layer.register_forward_hook(lambda _m, _i, found, place=place: remember(place, found))
        for place, layer in enumerate(layers)
    ]
    for start in range(0, len(pixels), _BATCH):
        network(torch.from_numpy(pixels[start : start + _BATCH]).float().permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()
    for norm, (total, squares), count in zip(norms, sums, counts, strict=True):
        mean = (total / count).float()
        variance = (squares / count).float() - mean**2
        bias = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance.clamp_min(0.0))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(bias + mean)


def write_checkpoint(network: DermNetwork, path: Path) -> str:
    """Write it as the averaged weights of a training run; returns the file's SHA-256 (hex)."""
    averaged = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"ema": {"n_averaged": torch.tensor(1)} | averaged}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blend(start: Mapping[str, Tensor], weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) * start + share * weights, of float tensors, as float16; counters are those of `weights`."""
    return {
        name: torch.lerp(start[name].float(), value.float(), share).half()
        if value.is_floating_point()
        else value
        for name, value in weights.items()
    }


def restored_prior(folder: Path, recipe: Recipe) -> Tensor:
    """What the export of a model folder added to the logits: its shift times the log prior of its training images, 8."""
    shift = json.loads((folder / "export.json").read_text())["prior_shift"]
    rows = read_rows(isic_folder())
    counts = np.bincount(labels_of(rows)[training_indices(rows, recipe.data)], minlength=len(TRAINED))
    return torch.from_numpy(shift * np.log(counts / counts.sum())).float()


def _difference(network: DermNetwork, path: Path, pixels: NDArray[np.uint8]) -> float:
    with torch.no_grad():
        found = network(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))[0].numpy()
    return float(np.abs(found - open_onnx(path)(pixels)[0]).max())


def _graph(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments.recipe)
    model = ModelStore(arguments.models).open(arguments.model)
    path, folder = model.path(model.manifest.onnx), isic_folder()
    rows = read_rows(folder)
    indices = training_indices(rows, recipe.data)
    geometry = InputGeometry.from_manifest(model.manifest.input)
    pixels = load_pixels(rows, indices[:: len(indices) // SAMPLED], folder, geometry)
    network = restore(DermNetwork(recipe.architecture, recipe.network), onnx.load(path), pixels)
    print(f"largest difference of a logit: {_difference(network, path, pixels[:_BATCH]):.2g}")
    print(f"checkpoint_sha256 = {write_checkpoint(network, arguments.output)}")


def _blend(arguments: argparse.Namespace) -> None:
    start = averaged_weights(arguments.start)
    if arguments.model is not None:
        folder = ModelStore(arguments.models).open(arguments.model).folder
        start["classify.bias"] = start["classify.bias"] - restored_prior(
            folder, read_recipe(arguments.recipe)
        )
    save_file(blend(start, load_file(arguments.weights), arguments.share), arguments.output)
    print(f"weights_sha256 = {hashlib.sha256(arguments.output.read_bytes()).hexdigest()}")


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("graph", "blend"))
    parser.add_argument("--model")
    parser.add_argument("--recipe", type=Path, help="the model's: its network and training folds")
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--start", type=Path, help="blend: a checkpoint")
    parser.add_argument("--weights", type=Path, help="blend: safetensors that `train` wrote")
    parser.add_argument("--share", type=float, help="blend: of the weights")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    (_graph if arguments.action == "graph" else _blend)(arguments)


if __name__ == "__main__":
    main()
