"""What `derm-cds` can do: one file a group of commands, each with `define(name, parser)`.

What runs a command takes its arguments, prints what it has to say, and returns an exit code, or None for 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

Run = Callable[[argparse.Namespace], int | None]


class AddAction(Protocol):
    """Adds an action below a command."""

    def __call__(self, name: str, run: Run, purpose: str) -> argparse.ArgumentParser:
        """Define what runs it and what it is for; its options are the caller's to add."""


def actions_of(parser: argparse.ArgumentParser) -> AddAction:
    """Give a command actions, of which one has to be named."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def add(name: str, run: Run, purpose: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        made.add_argument("--home", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        made.set_defaults(run=run)
        return made

    return add
