"""Nobody finds a hidden count: not by the margins, by linked tables, by the rule itself, nor by an earlier report."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.optimize import linprog

from serve_app.reports.suppression import cycles, hide, shifts, steps


def drawn(random: np.random.Generator, shape: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """A table with many small counts and zeros."""
    means = random.choice([0.0, 1.0, 3.0, 8.0, 60.0], size=shape)
    return dict(zip(np.ndindex(*shape), random.poisson(means).ravel().tolist(), strict=True))


def with_margins(counts: dict[tuple[int, ...], int]) -> dict[tuple[int | None, ...], list[tuple[int, ...]]]:
    """Each cell, and each sum over one dimension or more."""
    figures: dict[tuple[int | None, ...], list[tuple[int, ...]]] = {}
    for cell in counts:
        for summed in product((False, True), repeat=len(cell)):
            name = tuple(None if over else place for place, over in zip(cell, summed, strict=True))
            figures.setdefault(name, []).append(cell)
    return dict(sorted(figures.items(), key=lambda item: len(item[1])))


def solve(counts, figures, hidden, equal=()) -> dict:
    """An intruder: the least and the most that each hidden figure can be, by linear programming; zeros are known."""
    places = {atom: n for n, atom in enumerate(counts)}

    def row(*signed) -> np.ndarray:
        out = np.zeros(len(places))
        for parts, sign in signed:
            for atom in parts:
                out[places[atom]] += sign
        return out

    shown = [name for name in figures if name not in hidden]
    rows = [row((figures[name], 1)) for name in shown] + [row((a, 1), (b, -1)) for a, b in equal]
    sums = [sum(counts[a] for a in figures[name]) for name in shown] + [0] * len(equal)
    least = [row((figures[name], -1)) for name in hidden]  # what is hidden is not zero
    ranges = {}
    for name in hidden:
        wanted = row((figures[name], 1))
        ends = []
        for sign in (1, -1):
            found = linprog(
                sign * wanted, A_ub=np.array(least), b_ub=[-1] * len(least),
                A_eq=np.array(rows) if rows else None, b_eq=sums or None,
            )  # fmt: skip
            ends.append(np.inf if found.status == 3 else sign * found.fun)
        ranges[name] = ends
    return ranges


def determined(counts, figures, hidden) -> list:
    """An intruder who solves the linear system of all that is shown: which hidden figures have one solution."""
    places = {atom: n for n, atom in enumerate(counts)}
    matrix = np.zeros((len(figures), len(places)))
    for row, parts in enumerate(figures.values()):
        matrix[row, [places[atom] for atom in parts]] = 1
    shown = np.array([name not in hidden for name in figures])
    zero = np.array([sum(counts[atom] for atom in parts) == 0 for parts in figures.values()])
    known = np.vstack([matrix[shown], np.eye(len(places))[matrix[zero].any(axis=0)]])
    projected = matrix - matrix @ np.linalg.pinv(known) @ known
    return [name for n, name in enumerate(figures) if name in hidden and np.allclose(projected[n], 0)]


def moves_of(counts) -> list:
    """All that a table with margins can do."""
    atoms = list(counts)
    if len(atoms[0]) == 1:
        return [*shifts(atoms), *steps(atoms)]
    rows, columns = ({atom[n] for atom in atoms} for n in (0, 1))
    lines = [[atom for atom in atoms if atom[n] == place] for n in (0, 1) for place in (rows, columns)[n]]
    around = cycles(rows, columns, lambda row, column: (row, column))
    return [*around, *(move for line in lines for move in shifts(line)), *steps(atoms)]


@pytest.mark.parametrize(("shape", "tables"), [((6,), 500), ((3, 4), 500)])
def test_no_hidden_count_of_random_tables_can_be_solved(shape: tuple[int, ...], tables: int) -> None:
    """1,000 tables in all, with every margin shown; of every tenth, the bounds of each hidden count, too."""
    random = np.random.default_rng(len(shape))
    shown = small = 0
    for number in range(tables):
        counts = drawn(random, shape)
        figures = with_margins(counts)
        values = {name: sum(counts[cell] for cell in parts) for name, parts in figures.items()}
        hidden = hide(counts, figures, moves_of(counts), random=random)
        assert all(name in hidden for name, value in values.items() if 1 <= value <= 4)
        assert not any(values[name] == 0 for name in hidden)
        assert determined(counts, figures, hidden) == []
        if number % 10 == 0:
            for name, (least, most) in solve(counts, figures, hidden).items():
                assert most - least > 0.5, (counts, name)
        shown += len(values) - len(hidden)
        small += sum(1 <= value <= 4 for value in values.values())
    assert small > 800
    assert shown > small  # it does not hide all


def test_not_even_who_is_told_which_are_small_finds_a_count() -> None:
    """Three counts and their sum, by brute force: all whole numbers that fit what is shown, and what is said of the rest."""
    random, every = np.random.default_rng(1), np.array(list(product(range(10), repeat=3)))
    every = np.column_stack([every, every.sum(axis=1)])
    kinds = np.digitize(every, [1, 5])  # zero, small, large
    secrets = 0
    for counts in product(range(9), repeat=3):
        named = {(n,): count for n, count in enumerate(counts)}
        hidden = hide(named, with_margins(named), moves_of(named), random=random)
        is_hidden = np.array([(0,) in hidden, (1,) in hidden, (2,) in hidden, (None,) in hidden])
        own = np.array([*counts, sum(counts)])
        fits = (every == own)[:, ~is_hidden].all(axis=1) & (kinds == np.digitize(own, [1, 5])).all(axis=1)
        assert (np.ptp(every[fits], axis=0) > 0)[is_hidden].all(), counts
        secrets += int(is_hidden.sum())
    assert secrets > 500


def test_two_tables_of_the_same_things_do_not_give_each_other_away() -> None:
    """Sites and ages of the same lesions: what one table says of the sum, the other knows."""
    random = np.random.default_rng(5)
    for _ in range(60):
        total = int(random.integers(1, 60))
        sites, ages = (random.multinomial(total, random.dirichlet([0.4] * n)).tolist() for n in (4, 5))
        counts = {("site", n): count for n, count in enumerate(sites)} | {
            ("age", n): count for n, count in enumerate(ages)
        }
        figures = {atom: [atom] for atom in counts} | {"all": [atom for atom in counts if atom[0] == "site"]}
        equal = [tuple([atom for atom in counts if atom[0] == table] for table in ("site", "age"))]
        moves = [*(move for side in equal[0] for move in shifts(side)), *steps(*equal[0])]
        hidden = hide(counts, figures, moves, random=random)
        for name, (least, most) in solve(counts, figures, hidden, equal).items():
            assert most - least > 0.5, (counts, name)


def test_the_difference_to_the_last_report_is_never_small() -> None:
    """Report after report: what was shown last of a count and what is shown now differ by nothing, or by five or more."""
    random = np.random.default_rng(7)
    for _ in range(60):
        counts = {"missed": 0, "found": 0, "benign": 0}
        figures = {**{name: [name] for name in counts}, "malignant": ["missed", "found"], "all": list(counts)}
        moves, seen = [*shifts(list(counts)), *steps(list(counts))], 0
        last: dict[str, tuple[int, int]] = {}
        for edition in range(12):
            more = dict(zip(counts, random.poisson((0.3, 3, 9)), strict=True))
            counts = {name: count + int(more[name]) for name, count in counts.items()}
            values = {name: sum(counts[part] for part in parts) for name, parts in figures.items()}
            before = {name: value for name, (value, _) in last.items()}
            hidden = hide(counts, figures, moves, shown_before=before, random=random)
            shown = {name: (values[name], edition) for name in figures.keys() - hidden}
            for name in shown.keys() & last.keys():
                assert not 0 < abs(values[name] - before[name]) < 5
                seen += 1
            # Nor what two that were shown together tell of a third.
            if {"found", "malignant"} <= shown.keys() & last.keys() and last["found"][1] == last["malignant"][
                1
            ]:
                change = values["malignant"] - before["malignant"] - values["found"] + before["found"]
                assert not 0 < abs(change) < 5
            last |= shown
        assert seen
