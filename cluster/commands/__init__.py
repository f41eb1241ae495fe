"""What `derm-cds` can do: one file a group of commands, each with `define(name, parser)`.

What runs a command takes its arguments, prints what it has to say, and returns an exit code, or None for 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Run = Callable[[argparse.Namespace], int | None]


def actions_of(parser: argparse.ArgumentParser) -> Callable[[str, Run, str], argparse.ArgumentParser]:
    """Give a command actions; what is returned adds one: its name, what runs it, and what it is for."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def add(name: str, run: Run, purpose: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        made.add_argument("--home", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        made.set_defaults(run=run)
        return made

    return add
