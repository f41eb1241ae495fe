"""Average the weights of two checkpoints of one run of restarts: `python -m data_jobs.training.soup`.

A model that was trained on from another often lies in the same basin of the loss; the mean of their weights then
generalises as their ensemble does, at the cost of one (Wortsman et al., Model soups, ICML 2022). Which share is
best is measured on the calibration fold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def mix(first: State, second: State, share: float) -> State:
    """(1 - share) of `first` and `share` of `second`; counters (whole numbers) are the second's.

    Raises ValueError when they are not of one network, or the share is not between 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"A share of {share} is not between 0 and 1.")
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        raise ValueError("The two checkpoints are not of one network.")
    return {
        name: torch.lerp(first[name], value, share) if value.is_floating_point() else value
        for name, value in second.items()
    }


def read_averaged(path: Path) -> State:
    """The averaged weights of a checkpoint, as `train` writes it."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    averaged: State = state["ema"]
    return averaged


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path, help="checkpoint.pt that the second was trained on from")
    parser.add_argument("second", type=Path, help="checkpoint.pt")
    parser.add_argument("--share", type=float, default=0.5, help="of the second")
    parser.add_argument("--output", type=Path, required=True, help="a checkpoint for `export`")
    arguments = parser.parse_args()
    mixed = mix(read_averaged(arguments.first), read_averaged(arguments.second), arguments.share)
    torch.save({"ema": mixed}, arguments.output)
    parts = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (arguments.first, arguments.second)
    }
    print(json.dumps({"share": arguments.share, "of": parts}))


if __name__ == "__main__":
    main()
