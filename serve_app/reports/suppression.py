"""Which counts of published tables are hidden, so that none below five can be worked out from those that are shown.

Primary suppression (FCSM Statistical Policy Working Paper 22, 2005, chapter 2): a count of 1 to 4 is hidden; zero is
shown. So is a count that changed by 1 to 4 since it was last shown: the difference is a small count, too.
Complementary suppression (chapter 4): further counts are hidden until, for each hidden one, there is *another* set of
whole numbers in which it differs, all counts that are shown are the same, the small ones are 1 to 4 as well and the
others 5 or more. That set is constructed: no hidden count follows from what is shown, not even for a reader who is
told which of them are small.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

#: The least count that is shown, but for zero.
THRESHOLD = 5

Atom = TypeVar("Atom", bound=Hashable)
Name = TypeVar("Name", bound=Hashable)
_Matrix = NDArray[np.float64]
_UNBOUNDED = np.inf


def hide(
    counts: Mapping[Atom, int],
    figures: Mapping[Name, Collection[Atom]],
    *,
    equal: Sequence[tuple[Collection[Atom], Collection[Atom]]] = (),
    shown_before: Mapping[Name, int] | None = None,
    random: np.random.Generator | None = None,
) -> frozenset[Name]:
    """Choose the figures to hide.

    `counts`: what is counted, each of a thing once. `figures`: what is to be published, each the sum of some counts; any
    difference of them that a reader may be interested in is one of them, too. `equal`: collections of counts that
    everybody knows have the same sum. `shown_before`: what was last shown of a figure. Of equal figures any may be hidden,
    as `random` has it: an order would tell which of two is the small one.
    """
    names = list(figures)
    atoms = {atom: n for n, atom in enumerate(dict.fromkeys(a for parts in figures.values() for a in parts))}
    rows = np.zeros((len(names) + len(equal), len(atoms)))
    for row, parts in enumerate(figures.values()):
        rows[row, [atoms[atom] for atom in parts]] = 1
    for row, (left, right) in enumerate(equal, len(names)):
        for side, sign in ((left, 1), (right, -1)):
            rows[row, [atoms[atom] for atom in side]] = sign
    # Counts that only come together are one.
    columns, which = np.unique(rows, axis=1, return_inverse=True)
    held = np.zeros(columns.shape[1])
    np.add.at(held, which.ravel(), [counts.get(atom, 0) for atom in atoms])
    table = _Table(columns[: len(names)], columns[len(names) :], held)
    before = shown_before or {}
    chance = random or np.random.default_rng()
    return frozenset(names[n] for n in table.hide([before.get(name) for name in names], chance))


class _Table:
    def __init__(self, figures: _Matrix, identities: _Matrix, counts: _Matrix) -> None:
        self.figures, self.values = figures, figures @ counts
        self.identities, self.counts = identities, counts
        # What is shown as zero has no part that is anything else.
        self.free = ~(figures[self.values == 0] > 0).any(axis=0)

    def hide(self, before: Sequence[int | None], random: np.random.Generator) -> list[int]:
        """Numbers of the figures to hide."""
        bands = [
            _band(int(value), last) for value, last in zip(self.values.tolist(), before, strict=True)
        ]
        hidden = np.array([band is not None for band in bands], dtype=bool)
        low, high = np.array([band or (THRESHOLD, _UNBOUNDED) for band in bands], dtype=float).reshape(-1, 2).T
        while len(exposed := self._exposed(hidden, low, high)):
            victims: set[int] = set()
            if not len(shown := np.flatnonzero(~hidden & (self.values > 0))):
                break  # nothing is told but what is zero
            for figure in exposed:
                candidates = self._known_by(figure, shown)
                if not victims.intersection(candidates.tolist()):
                    worth = self.values[candidates] + random.uniform(0, 0.5, len(candidates))
                    victims.add(int(candidates[np.argmin(worth)]))
            hidden[list(victims)] = True
        return [int(n) for n in np.flatnonzero(hidden)]

    def _exposed(self, hidden: NDArray[np.bool_], low: _Matrix, high: _Matrix) -> NDArray[np.intp]:
        """Hidden figures for which no other set of numbers has been found."""
        asked = np.flatnonzero(hidden)
        if not len(asked):
            return asked
        known = np.vstack([self.figures[~hidden], self.identities])[:, self.free]
        basis = _null_space(known)
        moves = np.vstack([basis, -basis])
        counts, parts = self.counts[self.free], self.figures[asked][:, self.free]

        def exposed_to(moves: _Matrix) -> NDArray[np.bool_]:
            changed = moves @ parts.T
            moved = changed + self.values[asked]
            fits = (moves + counts >= 0).all(axis=1)
            fits &= ((moved >= low[asked]) & (moved <= high[asked])).all(axis=1)
            return ~(changed[fits] != 0).any(axis=0)

        exposed = exposed_to(moves)
        if exposed.any():  # one thing more here, one less there
            touching = moves[((moves @ parts[exposed].T) != 0).any(axis=1)]
            for move in touching:
                exposed &= exposed_to(moves + move)
        return asked[exposed]

    def _known_by(self, figure: int, shown: NDArray[np.intp]) -> NDArray[np.intp]:
        """Figures that a hidden one follows from; where it follows from none, and only the bounds tell: its neighbours."""
        basis = np.vstack([self.figures[shown], self.identities])[:, self.free]
        wanted = self.figures[figure][self.free]
        weights, *_ = np.linalg.lstsq(basis.T, wanted, rcond=None)
        if np.allclose(basis.T @ weights, wanted, atol=1e-6):
            used = shown[np.abs(weights[: len(shown)]) > 1e-6]
        else:
            used = shown[(self.figures[shown][:, self.free] @ wanted) > 0]
        return used if len(used) else shown


def _band(value: int, last: int | None) -> tuple[float, float] | None:
    """Between what a count is known to lie if it is hidden for itself; None where it need not be."""
    if 0 < value < THRESHOLD:
        return 1, THRESHOLD - 1
    if last is not None and 0 < abs(value - last) < THRESHOLD:
        near, far = (last + 1, last + THRESHOLD - 1) if value > last else (last - THRESHOLD + 1, last - 1)
        return max(near, 0), far
    return None


def _null_space(rows: _Matrix) -> _Matrix:
    """Whole numbers that every row multiplies to zero: a basis, as far as its vectors are whole."""
    work, (height, width), pivots = rows.copy(), rows.shape, list[int]()
    for column in range(width):
        top = len(pivots)
        if top == height:
            break
        best = top + int(np.argmax(np.abs(work[top:, column])))
        if abs(work[best, column]) < 1e-9:
            continue
        work[[top, best]] = work[[best, top]]
        work[top] /= work[top, column]
        others = np.abs(work[:, column]) > 1e-9
        others[top] = False
        work[others] -= np.outer(work[others, column], work[top])
        pivots.append(column)
    loose = [column for column in range(width) if column not in set(pivots)]
    basis = np.zeros((len(loose), width))
    basis[range(len(loose)), loose] = 1
    basis[:, pivots] = -work[: len(pivots), loose].T
    whole = np.round(basis)
    kept: _Matrix = whole[(np.abs(whole - basis) < 1e-6).all(axis=1)]
    return kept
