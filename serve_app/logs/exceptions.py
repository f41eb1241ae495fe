"""An exception as a log may tell of it: types and places, and text only where it is ours.

The text of an exception quotes what it failed on: a row, a form field, a byte string. Local variables are
never looked at.
"""

from __future__ import annotations

from pathlib import Path
import sys
import traceback
from typing import Any

from serve_app.domain.errors import DermError

_CHAIN = 5
_FRAMES = 12
_ROOT = str(Path(__file__).resolve().parents[2]) + "/"
_SERVER_FAULT = 500


def describe(error: BaseException) -> list[dict[str, Any]]:
    """Describe an exception and what caused it, outermost first: `type`, `at` (innermost last), and our `text`."""
    described: list[dict[str, Any]] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(described) < _CHAIN:
        seen.add(id(current))
        told: dict[str, Any] = {"type": _name(type(current)), "at": _places(current)}
        if text := own_text(current):
            told["text"] = text
        described.append(told)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return described


def own_text(error: BaseException) -> str:
    """The text of an error of ours that tells of the service; one that tells of a request quotes its caller."""
    return str(error) if isinstance(error, DermError) and error.status >= _SERVER_FAULT else ""


def in_lines(described: list[dict[str, Any]]) -> str:
    """Write a description as lines, for a handler that knows no fields."""
    return "\n".join(
        f"{'caused by ' if number else ''}{told['type']}{': ' if told.get('text') else ''}{told.get('text', '')}"
        + "".join(f"\n  at {place}" for place in told["at"])
        for number, told in enumerate(described)
    )


def _name(kind: type[BaseException]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _places(error: BaseException) -> list[str]:
    # Not `extract_tb`, which reads source lines: a literal in one of them may be anything.
    frames = list(traceback.walk_tb(error.__traceback__))[-_FRAMES:]
    return [f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}" for frame, line in frames]


def _short(path: str) -> str:
    if path.startswith(_ROOT) and "/site-packages/" not in path:
        return path.removeprefix(_ROOT)
    for root in sorted(sys.path, key=len, reverse=True):
        if root and path.startswith(f"{root}/"):
            return path.removeprefix(f"{root}/")
    return path.rpartition("/")[2]
