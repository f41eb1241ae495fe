"""Steps of the training package, each in a process of its own: torch stays out of the command line."""

from __future__ import annotations

import subprocess
import sys

from data_jobs.promotion.refusal import ImportRefused
from serve_app.domain.errors import DermError

#: What the `train` extra brings and serving does without.
_EXTRA = ("torch", "timm", "onnx", "safetensors", "skimage", "sklearn", "matplotlib")


def run_step(module: str, *arguments: object) -> str:
    """Run `python -m MODULE ARGUMENTS` and return what it printed.

    Raises ImportRefused with the last thing it said when it fails, DermError when the `train`
    extra is not installed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip().splitlines()
    last = said[-1] if said else f"exit code {done.returncode}"
    if any(f"No module named '{name}" in last for name in _EXTRA):
        raise DermError(
            f"{module} needs the `train` extra ({last}): pip install 'pms-derm-cds[train,cpu]' into this environment."
        )
    raise ImportRefused(f"{module.rpartition('.')[2]}: {last.removeprefix('ValueError: ')}")
