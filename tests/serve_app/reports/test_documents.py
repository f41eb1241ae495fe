"""The published tables: their figures against textbook ones, and an intruder who has all of a report."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from scipy.stats import binomtest

from serve_app.reports.documents import TRUTHS, proportion
from serve_app.reports.performance import GROUPS, PERFORMANCE_TABLES, assess_performance
from serve_app.reports.summary import SUMMARY_TABLES, summarise

ACTIONS = ("refer", "not")
MEASURES = {
    "melanoma": ["melanoma"],
    "other_malignant": ["other_malignant"],
    "malignant": ["melanoma", "other_malignant"],
    "benign": ["benign"],
}


@pytest.mark.parametrize(("part", "n"), [(0, 7), (1, 9), (57, 59), (59, 59), (500, 1000)])
def test_intervals_are_wilsons(part: int, n: int) -> None:
    found, expected = proportion(part, n), binomtest(part, n).proportion_ci(method="wilson")
    assert (found.value, found.n) == (round(part / n, 6), n)
    assert (found.lower, found.upper) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_nothing_is_a_share_of_nothing_or_of_what_is_hidden() -> None:
    assert proportion(0, 0) is proportion(None, 9) is proportion(3, None) is None


def lesions(random: np.random.Generator, n: int, models: tuple[str, ...] = ("m.a",)) -> dict[str, Counter]:
    """Cells of so many lesions; a good model, few outcomes."""
    cells: dict[str, Counter] = {table: Counter() for table in PERFORMANCE_TABLES}
    shares = {table: random.dirichlet(np.full(len(groups), 0.6)) for table, groups in GROUPS.items()}
    for model in models:
        for _ in range(n):
            truth = random.choice(TRUTHS, p=[0.03, 0.06, 0.2, 0.71])
            refer = random.random() < {"melanoma": 0.96, "other_malignant": 0.9}.get(truth, 0.3)
            said = (model, ACTIONS[0] if refer else ACTIONS[1], str(truth))
            for table, groups in GROUPS.items():
                cells[table][*said, str(random.choice(groups, p=shares[table]))] += 1
            if random.random() < 0.3:
                level = str(random.choice(["low", "medium", "high"])) if not refer else "high"
                intended = str(random.choice(["none", "routine", "expedited", "urgent"]))
                made = str(random.choice(["true", "false", "unknown"]))
                cells["intended"][model, intended, level, made, *said[1:]] += 1
    return cells


def equations(model) -> tuple[list[tuple[dict, int]], list[tuple[object, dict]]]:  # noqa: C901
    """All that a report says of a model's lesions, as sums of what is counted; and what it hides."""
    shown, hidden = [], []

    def note(value, table, groups, actions, truths, what) -> None:
        # The three tables divide the same lesions: `all` is the sum of any.
        for of in GROUPS if table is None else [table]:
            parts = {(of, a, t, g): 1 for a in actions for t in truths for g in (groups or GROUPS[of])}
            if value is None:
                hidden.append((what, parts))
            else:
                shown.append((parts, value))

    tables = [
        (None, [model.all]),
        ("site", model.by_site),
        ("age_band", model.by_age_band),
        ("skin_type", model.by_skin_type),
    ]
    for table, rows in tables:
        for row in rows:
            groups = None if row.group is None else [row.group]
            note(row.lesions, table, groups, ACTIONS, TRUTHS, (table, row.group, "lesions"))
            note(row.with_outcome, table, groups, ACTIONS, TRUTHS[:3], (table, row.group, "with_outcome"))
            for name, truths in MEASURES.items():
                part = getattr(row, name)
                missed = part.not_referred if name == "benign" else part.missed
                for value, actions in (
                    (part.n, ACTIONS),
                    (part.referred, ACTIONS[:1]),
                    (missed, ACTIONS[1:]),
                ):
                    note(value, table, groups, actions, truths, (table, row.group, name, actions))
            # A share and its n give its part away.
            if (ppv := row.positive_predictive_value) is not None:
                note(ppv.n, table, groups, ACTIONS[:1], TRUTHS[:3], "")
                note(round(ppv.value * ppv.n), table, groups, ACTIONS[:1], TRUTHS[:2], "")
    for action in ACTIONS:
        for truth in TRUTHS:
            for other in ("age_band", "skin_type"):
                left = {("site", action, truth, g): 1 for g in GROUPS["site"]}
                shown.append((left | {(other, action, truth, g): -1 for g in GROUPS[other]}, 0))
    return shown, hidden


@pytest.mark.parametrize(("n", "reports"), [(30, 3), (300, 3), (3000, 1)])
def test_nobody_solves_a_whole_report_for_what_it_hides(n: int, reports: int) -> None:
    """Linear algebra over everything a performance report shows, with the tables that divide the same lesions."""
    random = np.random.default_rng(n)
    secrets = 0
    for _ in range(reports):
        report, _ = assess_performance(lesions(random, n), {}, random=random)
        (model,) = report.models
        shown, hidden = equations(model)
        atoms = {atom: k for k, atom in enumerate(dict.fromkeys(a for parts, _ in shown for a in parts))}
        for _, parts in hidden:
            for atom in parts:
                atoms.setdefault(atom, len(atoms))

        def row(parts) -> np.ndarray:
            out = np.zeros(len(atoms))  # noqa: B023
            out[[atoms[atom] for atom in parts]] = list(parts.values())  # noqa: B023
            return out

        zero = {atom for parts, value in shown if value == 0 and min(parts.values()) > 0 for atom in parts}
        known = np.array([row(parts) for parts, _ in shown] + [row({atom: 1}) for atom in zero])
        projection = np.linalg.pinv(known) @ known
        for what, parts in hidden:
            wanted = row(parts)
            assert not np.allclose(wanted @ projection, wanted, atol=1e-6), what
            secrets += 1
    assert secrets > 50


def numbers_in(value) -> list[int]:
    """Every count of a document."""
    if is_dataclass(value):
        return [n for each in fields(value) for n in numbers_in(getattr(value, each.name))]
    if isinstance(value, dict):
        return [n for each in value.values() for n in numbers_in(each)]
    if isinstance(value, list):
        return [n for each in value for n in numbers_in(each)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def test_no_small_count_is_in_any_document() -> None:
    random = np.random.default_rng(3)
    for n in (0, 3, 40, 400):
        report, shown = assess_performance(lesions(random, n, ("m.a", "m.b")), {}, random=random)
        words = {table: Counter() for table in SUMMARY_TABLES}
        for _ in range(n):
            words["outcome"][str(random.choice(["decided", "review"])),] += 1
            words["diagnosis"][str(random.choice(["MEL", "NV", "BCC"], p=[0.05, 0.85, 0.1])),] += 1
            words["level"][str(random.choice(["low", "medium", "high"])),] += 1
            words["urgency"][str(random.choice(["routine", "urgent"], p=[0.98, 0.02])),] += 1
            words["seconds"][str(random.integers(0, 5)),] += 1
        words["decision"]["accept", ""] = n // 3
        words["decision"]["override", "other"] = n // 100
        words["result"]["histology", "melanoma"] = n // 90
        words["result"]["follow_up", "benign"] = n // 4
        summary = summarise(words, (n, 2 * n), random=random)
        for document in (report, summary):
            assert not [value for value in numbers_in(document) if 1 <= value <= 4]
        assert all(value == 0 or value >= 5 for value in shown.values())
        if n == 400:
            assert (summary.diagnoses["total"], summary.adoption.share.value) == (400, 0.5)


def test_encounters_with_a_complaint_may_be_fewer_than_those_with_an_image() -> None:
    """Each count is what it was told to be; of such a pair there is no share."""
    nothing = {table: Counter() for table in SUMMARY_TABLES}
    found = summarise(nothing, (30, 20), random=np.random.default_rng(5)).adoption
    assert (found.assessed_encounters, found.skin_complaint_encounters, found.share) == (30, 20, None)


def test_the_figures_are_those_of_the_counts() -> None:
    """Ten thousand lesions of one group in each table: every count can be shown."""
    counts = {("refer", "melanoma"): 95, ("not", "melanoma"): 5, ("refer", "other_malignant"): 180,
              ("not", "other_malignant"): 20, ("refer", "benign"): 200, ("not", "benign"): 600,
              ("refer", "unknown"): 900, ("not", "unknown"): 8000}  # fmt: skip
    cells: dict[str, Counter] = {table: Counter() for table in PERFORMANCE_TABLES}
    for table, groups in GROUPS.items():
        cells[table].update({("m.a", *said, groups[0]): n for said, n in counts.items()})
    cells["intended"].update({
        ("m.a", "routine", "low", "false", "not", "benign"): 30, ("m.a", "urgent", "low", "true", "not", "unknown"): 10,
        ("m.a", "none", "low", "false", "not", "benign"): 50, ("m.a", "routine", "high", "true", "refer", "melanoma"): 60,
    })  # fmt: skip
    report, _ = assess_performance(cells, {}, random=np.random.default_rng(0))
    (model,) = report.models
    found = model.all
    assert (found.lesions, found.with_outcome, found.share_with_outcome) == (10_000, 1_100, 0.11)
    assert found.melanoma.sensitivity == proportion(95, 100)
    assert found.malignant.sensitivity == proportion(275, 300)
    assert found.benign.specificity == proportion(600, 800)
    assert found.positive_predictive_value == proportion(275, 475)
    assert model.by_site[0].malignant == found.malignant
    assert model.by_site[1].lesions == 0
    low = model.low_risk_referrals
    assert (low.intended, low.made, low.not_made, low.not_known) == (40, 10, 30, 0)
    assert low.avoided == proportion(30, 40)
    assert (low.avoided_with_outcome, low.avoided_malignant) == (30, 0)
    by = {each.intended: each for each in model.against_intention}
    assert (by["routine"].lesions, by["routine"].service_refers, by["routine"].service_does_not_refer) == (
        90,
        60,
        30,
    )


def test_few_missed_melanomas_leave_a_bound() -> None:
    """The better the model, the fewer it misses: what is hidden then is said to be at least so much."""
    cells: dict[str, Counter] = {table: Counter() for table in PERFORMANCE_TABLES}
    counts = {("refer", "melanoma"): 98, ("not", "melanoma"): 2, ("refer", "benign"): 40, ("not", "benign"): 500,
              ("refer", "unknown"): 300, ("not", "unknown"): 900}  # fmt: skip
    for table, groups in GROUPS.items():
        cells[table].update({("m.a", *said, groups[0]): n for said, n in counts.items()})
    report, _ = assess_performance(cells, {}, random=np.random.default_rng(0))
    found = report.models[0].all
    assert (found.melanoma.referred, found.melanoma.missed, found.melanoma.sensitivity) == (None, None, None)
    assert (found.melanoma.n, found.melanoma.at_least) == (100, 0.96)


def test_nobody_learns_a_small_change_from_two_reports() -> None:
    """Month after month: what both of two reports show says nothing of a count that changed by 1 to 4."""
    random, before, secrets = np.random.default_rng(8), {}, 0
    cells = lesions(random, 200)
    values: dict = {}
    for _ in range(4):
        more = lesions(random, 60)
        for table in ("site", "age_band", "skin_type", "intended"):
            cells[table].update(more[table])
        report, shown = assess_performance(cells, before, random=random)
        both = [name for name in shown if name in before and values[name][1] == values["round"]]
        atoms = {key: n for n, key in enumerate((t, *key) for t in GROUPS for key in cells[t])}

        def row(name) -> np.ndarray:
            out = np.zeros(len(atoms))  # noqa: B023
            _, table, group, measure = name
            what, _, word = measure.partition(".")
            truths = {**MEASURES, "unknown": ["unknown"], "lesions": TRUTHS}.get(what, TRUTHS[:3])
            actions = {"referred": ("refer",), "missed": ("not",)}.get(word, ACTIONS)
            actions = ("refer",) if what == "referred_known" else actions
            for key, n in atoms.items():  # noqa: B023
                of, _, action, truth, value = key
                if of == ("site" if table == "all" else table) and action in actions and truth in truths:
                    out[n] = group in {"", value}
            return out

        tables = [name for name in both if name[1] in {"all", *GROUPS}]
        if tables:
            known = np.array([row(name) for name in tables])
            projection = np.linalg.pinv(known) @ known
            now = {(t, *key): n for t in GROUPS for key, n in cells[t].items()}
            then = {(t, *key): n - more[t][key] for t in GROUPS for key, n in cells[t].items()}
            change = np.array([now[key] - then[key] for key in atoms])
            for name in values["all"]:
                wanted = row(name)
                if 0 < abs(wanted @ change) < 5:
                    assert not np.allclose(wanted @ projection, wanted, atol=1e-6), name
                    secrets += 1
        number = values.get("round", 0) + 1
        before |= shown
        values |= {name: (n, number) for name, n in shown.items()}
        values |= {"round": number, "all": [name for name in before if name[1] in {"all", *GROUPS}]}
        assert report.models[0].model_id == "m.a"
    assert secrets > 30


def test_few_more_missed_than_were_shown_leave_a_bound_too() -> None:
    cells: dict[str, Counter] = {table: Counter() for table in PERFORMANCE_TABLES}
    counts = {
        ("refer", "melanoma"): 190,
        ("not", "melanoma"): 10,
        ("not", "benign"): 500,
        ("not", "unknown"): 900,
    }
    for table, groups in GROUPS.items():
        cells[table].update({("m.a", *said, groups[0]): n for said, n in counts.items()})
    before = {("m.a", "all", "", "melanoma.missed"): 8}
    report, _ = assess_performance(cells, before, random=np.random.default_rng(0))
    found = report.models[0].all.melanoma
    assert (found.missed, found.sensitivity) == (None, None)
    assert found.at_least in {None, 0.94}
