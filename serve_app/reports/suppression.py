"""Which counts of published tables are hidden, so that none below five can be worked out from those that are shown.

Primary suppression (FCSM Statistical Policy Working Paper 22, 2005, chapter 2): a count of 1 to 4 is hidden; zero is
shown. So is a count that changed by 1 to 4 since it was last shown: the difference is a small count, too.
Complementary suppression (chapter 4): for each hidden count a *move* is found, a way to change the counts by one here and
there, after which the tables are as well published: the small counts are still 1 to 4, all others 5 or more, zeros are
zero. Whatever else it changes is hidden as well, as little as possible. So for each hidden count there is another set of whole
numbers in which it differs and all that is shown is the same: it does not follow from what is shown, not even for a
reader who is told which of the hidden ones are small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The least count that is shown, but for zero.
THRESHOLD = 5
#: How many moves are tried with every other one, where none fits alone.
_TRIED = 40

#: What is published, by name: sums of counts, which are named by any hashable value.
Name = tuple[str, ...]
Figures = dict[Name, Collection[Any]]
#: Counts that go up by one, and counts that go down.
Move = tuple[Sequence[Any], Sequence[Any]]


def hide(
    counts: Mapping[Any, int],
    figures: Mapping[Any, Collection[Any]],
    moves: Iterable[Move],
    *,
    shown_before: Mapping[Any, int] | None = None,
    random: np.random.Generator | None = None,
) -> frozenset[Any]:
    """Choose the figures to hide.

    A difference of figures that says something by itself must be one of them, too. `moves` change nothing that everybody
    knows beside the figures (that two tables divide the same lesions). `shown_before`: what was last shown of a figure.
    `random` chooses among figures of about one size: who could repeat the choice would learn from what was not hidden.
    """
    atoms = {atom: n for n, atom in enumerate(dict.fromkeys(a for parts in figures.values() for a in parts))}
    sums = np.zeros((len(figures), len(atoms)), dtype=np.float32)
    for row, parts in enumerate(figures.values()):
        sums[row, [atoms[atom] for atom in parts]] = 1
    held = np.array([counts.get(atom, 0) for atom in atoms], dtype=np.float32)
    values, before = sums @ held, shown_before or {}
    bands = [_band(int(value), before.get(name)) for name, value in zip(figures, values, strict=True)]
    low, high = (np.array([band[n] for band in bands], dtype=np.float32) for n in (0, 1))
    secret = np.array([band[2] for band in bands])

    # What is part of a zero that is shown does not change.
    fixed = {
        atom for parts, value in zip(figures.values(), values, strict=True) if not value for atom in parts
    }
    listed = [move for move in moves if fixed.isdisjoint(move[0]) and fixed.isdisjoint(move[1])]
    changes = np.zeros((len(listed), len(atoms)), dtype=np.float32)
    for row, move in enumerate(listed):
        for side, sign in zip(move, (1, -1), strict=True):
            for atom in side:
                changes[row, atoms[atom]] += sign
    possible = (changes + held >= 0).all(axis=1)
    moved = changes[possible] @ sums.T
    fits = ((moved >= low - values) & (moved <= high - values)).all(axis=1)
    touched = moved[fits] != 0

    hidden, covered = secret.copy(), np.zeros(len(figures), dtype=bool)
    # What hiding a figure costs: the larger, the more is lost.
    worth = np.log1p(values) + (random or np.random.default_rng()).uniform(0, 0.5, len(values))
    for figure in sorted(np.flatnonzero(secret), key=lambda n: -values[n]):
        if covered[figure]:
            continue
        ways = touched[touched[:, figure]]
        if not len(ways):
            ways = _in_two(int(figure), moved, low - values, high - values)
        if not len(ways):  # nothing is told but what is zero
            return frozenset(name for name, value in zip(figures, values, strict=True) if value)
        way = ways[np.argmin(ways @ np.where(hidden, 0, worth))]
        hidden |= way
        covered |= way
    return frozenset(name for name, is_hidden in zip(figures, hidden, strict=True) if is_hidden)


def _band(value: int, last: int | None) -> tuple[float, float, bool]:
    """Between what a count must stay, and whether it is hidden for itself."""
    if value == 0:
        return 0, 0, False
    if value < THRESHOLD:
        return 1, THRESHOLD - 1, True
    if last is not None and 0 < abs(value - last) < THRESHOLD:
        near, far = (last + 1, last + THRESHOLD - 1) if value > last else (last - THRESHOLD + 1, last - 1)
        return max(near, 1), far, True
    return THRESHOLD, np.inf, False


def most_hidden(value: int, last: int | None) -> int | None:
    """The most that a count can be that is hidden for itself; None for any other."""
    _, high, is_secret = _band(value, last)
    return int(high) if is_secret else None


def _in_two(
    figure: int, moved: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """What two moves touch that fit together and neither of them alone, one of them changing the figure."""
    first = moved[moved[:, figure] != 0]
    amiss = ((first < low) | (first > high)).sum(axis=1)
    found = []
    for one in first[np.argsort(amiss, kind="stable")[:_TRIED]]:
        both = moved + one
        fits = ((both >= low) & (both <= high)).all(axis=1) & (both[:, figure] != 0)
        found.append(both[fits] != 0)
    return np.concatenate(found) if found else np.zeros((0, moved.shape[1]), dtype=bool)


def shifts(atoms: Collection[Any]) -> list[Move]:
    """One from any count to any other."""
    return [move for a, b in combinations(atoms, 2) for move in (([a], [b]), ([b], [a]))]


def steps(*tables: Collection[Any]) -> list[Move]:
    """One more, or one less, in each of tables that divide the same things."""
    return [move for atoms in product(*tables) for move in ((atoms, ()), ((), atoms))]


def cycles(rows: Collection[Any], columns: Collection[Any], atom: Any) -> list[Move]:  # noqa: ANN401
    """Around any four counts of a table, so that no sum of a row or column changes; `atom(row, column)` names one."""
    return [
        move
        for i, j in combinations(rows, 2)
        for c, d in combinations(columns, 2)
        for move in (
            ([atom(i, c), atom(j, d)], [atom(i, d), atom(j, c)]),
            ([atom(i, d), atom(j, c)], [atom(i, c), atom(j, d)]),
        )
    ]


def find_shown(
    counts: Counter[Any],
    figures: Figures,
    moves: Iterable[Move],
    *,
    random: np.random.Generator,
    shown_before: Mapping[Name, int] | None = None,
) -> Callable[..., int | None]:
    """Hide what must be, and say of each figure what is shown of it."""
    hidden = hide(counts, figures, moves, shown_before=shown_before, random=random)

    def show(*name: str) -> int | None:
        return None if name in hidden else sum(counts[part] for part in figures[name])

    return show
