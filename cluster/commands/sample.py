"""`derm-cds sample PATH`: a drawn lesion, JPEG."""

from __future__ import annotations

import argparse
from pathlib import Path
import sys

from data_jobs.sample_lesion import write_sample


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `sample`."""
    parser.add_argument("path", type=Path, help="the JPEG file to write")
    parser.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> int:
    write_sample(arguments.path)
    sys.stdout.write(f"{arguments.path}: a drawing, not a photograph\n")
    return 0
