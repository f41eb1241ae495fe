"""Nobody finds a hidden count: not by the margins, by linked tables, by the rule itself, nor by an earlier report."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.optimize import linprog

from serve_app.reports.suppression import hide


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


@pytest.mark.parametrize(("shape", "tables"), [((6,), 480), ((3, 4), 480), ((2, 3, 3), 40)])
def test_no_hidden_count_of_random_tables_can_be_solved(shape: tuple[int, ...], tables: int) -> None:
    """1,000 tables in all, with every margin shown; of every tenth, the bounds of each hidden count, too."""
    random = np.random.default_rng(len(shape))
    shown = small = 0
    for number in range(tables):
        counts = drawn(random, shape)
        figures = with_margins(counts)
        values = {name: sum(counts[cell] for cell in parts) for name, parts in figures.items()}
        hidden = hide(counts, figures)
        assert all(name in hidden for name, value in values.items() if 1 <= value <= 4)
        assert not any(values[name] == 0 for name in hidden)
        assert determined(counts, figures, hidden) == []
        if number % 10 == 0 and len(shape) < 3:
            for name, (least, most) in solve(counts, figures, hidden).items():
                assert most - least > 0.5, (counts, name)
        shown += len(values) - len(hidden)
        small += sum(1 <= value <= 4 for value in values.values())
    assert small > 250
    assert shown > small  # it does not hide all


def test_nobody_who_knows_the_rule_finds_a_count() -> None:
    """All tables of up to 9 of three counts and their sum, as many as are published alike, by brute force."""
    published: dict[tuple, list[tuple[int, ...]]] = {}
    for counts in product(range(10), repeat=3):
        figures = with_margins({(place,): count for place, count in enumerate(counts)})
        values = {name: sum(counts[place] for (place,) in parts) for name, parts in figures.items()}
        for seed in range(4):  # it may be published in more ways than one
            random = np.random.default_rng(seed)
            hidden = hide({(n,): count for n, count in enumerate(counts)}, figures, random=random)
            seen = tuple((name, None if name in hidden else values[name]) for name in sorted(figures, key=str))
            published.setdefault(seen, []).append(counts)
    assert len(published) > 50
    for seen, alike in published.items():
        secret = [place for place in range(3) if dict(seen)[place,] is None]
        if max(map(max, alike)) < 9:  # else some that are published alike lie outside of what was drawn
            assert all(len({counts[place] for counts in alike}) > 1 for place in secret), (seen, alike)


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
        hidden = hide(counts, figures, equal=equal)
        for name, (least, most) in solve(counts, figures, hidden, equal).items():
            assert most - least > 0.5, (counts, name)


def test_the_difference_to_the_last_report_is_never_small() -> None:
    """A sum of two counts, report after report: what was shown last and what is shown now differ by none or by five or more."""
    random = np.random.default_rng(7)
    for _ in range(60):
        counts, last, seen = {"missed": 0, "found": 0, "benign": 0}, {}, 0
        figures = {**{name: [name] for name in counts}, "malignant": ["missed", "found"], "all": list(counts)}
        for _ in range(12):
            counts = {
                name: count + int(random.poisson(mean))
                for (name, count), mean in zip(counts.items(), (0.3, 3, 9), strict=True)
            }
            values = {name: sum(counts[part] for part in parts) for name, parts in figures.items()}
            hidden = hide(counts, figures, shown_before=last)
            for name in figures.keys() - hidden:
                assert not 0 < abs(values[name] - last.get(name, values[name])) < 5
                seen += 1
            both = [name for name in figures if name in last and name not in hidden]
            # Nor do differences of differences tell.
            if {"found", "malignant"} <= set(both):
                assert not 0 < (values["malignant"] - last["malignant"]) - (values["found"] - last["found"]) < 5
            last |= {name: values[name] for name in figures.keys() - hidden}
        assert seen
