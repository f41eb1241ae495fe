"""Markdown tables, and numbers as a card writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table with a newline at its end."""
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def between(value: float | None, interval: Sequence[float | None]) -> str:
    """`0.791 (0.772 to 0.809)`, or a dash for a figure that the images do not give."""
    if value is None or None in interval:
        return "–"
    low, high = interval
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def share(value: float | None) -> object:
    """The figure, or a dash where the images do not give it."""
    return "–" if value is None else value
