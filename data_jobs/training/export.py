"""Export a network: `python -m data_jobs.training.export --recipe R --checkpoint C --output O`.

Of a checkpoint that training wrote it chooses the serving input side and the prior shift on the fold that the recipe
calibrates on. `--weights W --positions P --side S` takes safetensors as they are: our own network's tensors, or those
of a timm classifier of the recipe's architecture, which gets a 512-wide layer that changes none of its logits. Either
way it writes `O/model.onnx` and proves that ONNX Runtime answers as torch does; `O/export.json` says all.
`--recipe ENSEMBLE --members W1 W2 ...` makes one graph of an ensemble's members, stored in half floats, each with its
share of the prior as its left-out fold has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import onnx
import onnxruntime as ort
from safetensors.torch import load_file
import timm
import torch
from torch import Tensor, nn

from data_jobs.training.dataset import (
    fold_indices,
    isic_folder,
    labels_of,
    load_pixels,
    read_bcn84,
    read_rows,
    training_indices,
)
from data_jobs.training.edge.onnx_copies import write_float16
from data_jobs.training.ensemble import Ensemble, read_ensemble
from data_jobs.training.ensemble_network import EnsembleNetwork, load_members
from data_jobs.training.evaluation.figures import accuracy_figures
from data_jobs.training.network import DermNetwork, averaged_weights, load_trunk, load_weights
from data_jobs.training.probabilities import fit_prior_shift, softmax
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.served_graph import state_labels
from data_jobs.training.unknown_heads import fit_heads
from deployments.preprocess.pixels import InputGeometry
from model_store.manifest import EMBEDDING_DIM
from serve_app.domain.diagnosis import TRAINED

OPSET = 18
#: Random images that parity of foreign weights is proven on, and their seed.
SAMPLED = 4
_SEED = 512
#: Images that an ensemble's bottleneck is fitted on.
BOTTLENECK_IMAGES = 2048


class PixelsIn(nn.Module):
    """The network as served: uint8 N×H×W×3 in, mean and std inside."""

    def __init__(self, network: nn.Module, outputs: tuple[str, ...] = ("logits", "bottleneck")) -> None:
        super().__init__()
        self.network = network
        self.outputs = outputs

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """What the network gives, as `outputs` names it."""
        found: tuple[Tensor, ...] = self.network(pixels.to(torch.float32).permute(0, 3, 1, 2))
        return found


@torch.inference_mode()
def run_torch(
    model: nn.Module, pixels: NDArray[np.uint8], batch: int = 64, output: int = 0
) -> NDArray[np.float32]:
    """Logits of uint8 N×H×W×3, or another of the model's outputs."""
    parts = [
        model(torch.from_numpy(pixels[i : i + batch]))[output].numpy() for i in range(0, len(pixels), batch)
    ]
    return np.concatenate(parts)


def side_figures(
    side: int, logits: NDArray[np.float32], labels: NDArray[np.int64], prior: NDArray[np.float64]
) -> dict[str, float]:
    """What an input side gives on these images, from raw logits: after its own prior shift and temperature."""
    shift, temperature = fit_prior_shift(logits, labels, prior)
    p = softmax(logits + shift * np.log(prior), temperature)
    fitted = {"side": side, "shift": shift, "temperature": round(temperature, 4)}
    return fitted | accuracy_figures(p, labels)


def choose_side(figures: list[dict[str, float]], tolerance: float = 0.005) -> dict[str, float]:
    """The smallest side within `tolerance` of the best (melanoma AUC + balanced accuracy) / 2."""
    scores = [(f["melanoma_auc"] + f["balanced_accuracy"]) / 2.0 for f in figures]
    good = [f for f, score in zip(figures, scores, strict=True) if score >= max(scores) - tolerance]
    return min(good, key=lambda f: f["side"])


def write_onnx(served: PixelsIn, side: int, path: Path) -> None:
    """Write the served graph: input `pixels`, any batch size; it names its labels."""
    example = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    torch.onnx.export(
        served.eval(),
        (example,),
        str(path),
        input_names=["pixels"],
        output_names=list(served.outputs),
        dynamic_axes={name: {0: "batch"} for name in ("pixels", *served.outputs)},
        opset_version=OPSET,
        dynamo=False,
    )
    model = onnx.load(path)
    state_labels(model)
    onnx.save(model, path)


@torch.inference_mode()
def onnx_parity(served: PixelsIn, path: Path, pixels: NDArray[np.uint8]) -> dict[str, float]:
    """Largest differences between torch and ONNX Runtime on uint8 N×H×W×3."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = dict(zip(served.outputs, session.run(list(served.outputs), {"pixels": pixels}), strict=True))
    expected = dict(zip(served.outputs, served.eval()(torch.from_numpy(pixels)), strict=True))
    differences = {name: float(np.abs(found[name] - expected[name].numpy()).max()) for name in found}
    return {
        "images": len(pixels),
        "max_abs_logit": differences["logits"],
        "max_abs_bottleneck": differences["bottleneck"],
    }


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


def export_weights(
    recipe: Recipe, weights: Path, positions: list[int], side: int, output: Path
) -> dict[str, Any]:
    """Write model.onnx and export.json, and return the latter; ValueError for weights of another network."""
    state = load_file(weights)
    report: dict[str, Any] = {"model_id": recipe.model_id, "side": side, "source": "safetensors"}
    network: DermNetwork
    if "classifier.weight" in state:
        network = adopt_classifier(recipe, state, positions)
        report["max_abs_logit_of_timm"] = classifier_difference(recipe, state, positions, network, side)
    else:
        network = DermNetwork(recipe.architecture, recipe.network).eval()
        load_weights(network, recipe.architecture, state)
    pixels = np.random.default_rng(_SEED).integers(0, 256, (SAMPLED, side, side, 3)).astype(np.uint8)
    return _write(PixelsIn(network), side, pixels, output, report | {"sides": [{"side": side}]})


def export_checkpoint(recipe: Recipe, checkpoint: Path, output: Path) -> dict[str, Any]:
    """Write model.onnx, at the best of the recipe's sides, and export.json, and return the latter."""
    network = DermNetwork(recipe.architecture, recipe.network).eval()
    load_weights(network, recipe.architecture, averaged_weights(checkpoint))
    folder = isic_folder()
    rows = read_rows(folder)
    all_labels = labels_of(rows)
    trained_on = all_labels[training_indices(rows, recipe.data)]
    prior = np.bincount(trained_on, minlength=len(TRAINED)) / len(trained_on)
    fold = fold_indices(rows, [recipe.data.fitted_fold])
    figures = []
    for side in recipe.serving_sides:
        pixels = load_pixels(rows, fold, folder, InputGeometry(side, recipe.data.interpolation))
        figures.append(side_figures(side, run_torch(PixelsIn(network), pixels), all_labels[fold], prior))
        print(json.dumps(figures[-1]), flush=True)
    chosen = choose_side(figures)
    side = int(chosen["side"])
    with torch.no_grad():
        network.classify.bias += torch.from_numpy(chosen["shift"] * np.log(prior)).float()
    sample = load_pixels(rows, fold[:64], folder, InputGeometry(side, recipe.data.interpolation))
    report = {
        "model_id": recipe.model_id,
        "side": side,
        "prior_shift": chosen["shift"],
        "training_images": len(trained_on),
        "sides": figures,
    }
    return _write(PixelsIn(network), side, sample, output, report)


@torch.inference_mode()
def export_ensemble(ensemble: Ensemble, weights: list[Path], output: Path) -> dict[str, Any]:
    """Write model.onnx of all members and export.json, and return the latter."""
    networks, side = load_members(ensemble, weights), int(ensemble.side or 0)
    folder = isic_folder()
    rows = read_rows(folder)
    labels = labels_of(rows)
    geometry = InputGeometry(side, ensemble.members[0].data.interpolation)
    figures = []
    for network, recipe in zip(networks, ensemble.members, strict=True):
        trained_on = labels[training_indices(rows, recipe.data)]
        prior = np.bincount(trained_on, minlength=len(TRAINED)) / len(trained_on)
        fold = fold_indices(rows, [recipe.data.fitted_fold])
        pixels = load_pixels(rows, fold, folder, geometry)
        found = side_figures(side, run_torch(PixelsIn(network), pixels), labels[fold], prior)
        network.classify.bias += torch.from_numpy(found["shift"] * np.log(prior)).float()
        figures.append({"member": recipe.tag, "training_images": len(trained_on), **found})
        print(json.dumps(figures[-1]), flush=True)
    unseen = ensemble.unseen(rows)
    both = rows + (read_bcn84(folder) if ensemble.members[0].data.with_bcn84 else [])
    fitted = fit_heads(ensemble, networks, both, [rows[i] for i in unseen], folder, geometry)
    whole = EnsembleNetwork(networks, fitted.heads).eval()
    kept = 1.0
    if len(networks) > 1:
        left_out = np.flatnonzero(ensemble.member_of(rows) >= 0)
        pixels = load_pixels(rows, left_out[:: max(1, len(left_out) // BOTTLENECK_IMAGES)], folder, geometry)
        features = [run_torch(PixelsIn(network), pixels, output=1) for network in networks]
        kept = whole.fit_bottleneck(np.concatenate(features, axis=1))
    sample = load_pixels(rows, unseen[:64], folder, geometry)
    report = {
        "model_id": ensemble.model_id,
        "side": side,
        "sides": figures,
        "bottleneck_variance": kept,
        "unknown": {"slope": fitted.slope, "intercept": fitted.intercept},
    }
    served = PixelsIn(whole, whole.outputs)
    return _write(served, side, sample, output, report, halved=True)


def _write(
    served: PixelsIn,
    side: int,
    pixels: NDArray[np.uint8],
    output: Path,
    report: dict[str, Any],
    *,
    halved: bool = False,
) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "model.onnx"
    write_onnx(served, side, path)
    if halved:
        write_float16(onnx.load(path), path)
    report |= {"opset": OPSET, "parity": onnx_parity(served, path, pixels)}
    (output / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--checkpoint", type=Path)
    given.add_argument(
        "--members", type=Path, nargs="+", help="safetensors of an ensemble's members, in order"
    )
    given.add_argument("--weights", type=Path, help="safetensors; needs --positions and --side")
    parser.add_argument("--positions", type=json.loads, help="of the eight among the logits, as a JSON list")
    parser.add_argument("--side", type=int)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    output = arguments.output
    if arguments.members:
        report = export_ensemble(read_ensemble(arguments.recipe), arguments.members, output)
        print(json.dumps(report["parity"]))
        return
    recipe = read_recipe(arguments.recipe)
    if arguments.checkpoint:
        report = export_checkpoint(recipe, arguments.checkpoint, output)
    else:
        report = export_weights(recipe, arguments.weights, arguments.positions, arguments.side, output)
    print(json.dumps(report["parity"]))


if __name__ == "__main__":
    main()
