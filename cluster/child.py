"""Processes of our own that do one step: ending one, and what it said last."""

from __future__ import annotations

import contextlib
from pathlib import Path
import subprocess

_STOP_S = 5


def end_child(child: subprocess.Popen[str]) -> None:
    """End it if it still runs: politely, after 5 s by force."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()


def last_words(log: Path) -> str:
    """The last line that begins a statement: of a traceback, the exception's own."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line[:1].strip()]
    return lines[-1] if lines else "it said nothing"
