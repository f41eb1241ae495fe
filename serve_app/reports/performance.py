"""Performance of each model version, against what became of the lesions and against what clinicians intended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from serve_app.domain.patient import AnatomSite
from serve_app.domain.review import Referral
from serve_app.records.reports import Cells
from serve_app.reports.documents import (
    MALIGNANT,
    TRUTHS,
    UNKNOWN,
    Accuracy,
    Benign,
    Count,
    Detection,
    Intention,
    LowRisk,
    ModelPerformance,
    Performance,
    proportion,
)
from serve_app.reports.suppression import Figures, Move, Name, cycles, find_shown, most_hidden, shifts, steps

_ACTIONS = ("refer", "not")
_DETECTED = ("melanoma", "other_malignant", "malignant")
AGE_BANDS = ("0-19", *(f"{age}-{age + 9}" for age in range(20, 80, 10)), "80+")
SKIN_TYPES = ("I", "II", "III", "IV", "V", "VI")
#: The tables of lesions, each of which divides all of them, and the groups that are always listed.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "site": (*AnatomSite, UNKNOWN),
    "age_band": (*AGE_BANDS, UNKNOWN),
    "skin_type": (*SKIN_TYPES, UNKNOWN),
}
PERFORMANCE_TABLES = (*GROUPS, "intended")
#: How many groups of each table are tried where all tables must change at once.
_TRIED = 3


_MEASURES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{
        f"{what}.{word}": (actions, truths)
        for what, truths in {
            "melanoma": ("melanoma",),
            "other_malignant": ("other_malignant",),
            "malignant": MALIGNANT,
            "benign": ("benign",),
        }.items()
        for word, actions in {"referred": ("refer",), "missed": ("not",), "n": _ACTIONS}.items()
    },
    "unknown": (_ACTIONS, (UNKNOWN,)),
    "referred_known": (("refer",), TRUTHS[:3]),
    "with_outcome": (_ACTIONS, TRUTHS[:3]),
    "lesions": (_ACTIONS, TRUTHS),
}


def assess_performance(
    cells: Cells, shown_before: Mapping[Name, int], *, random: np.random.Generator
) -> tuple[Performance, dict[Name, int]]:
    """Make the performance report, and list what it shows; `shown_before` is what earlier ones showed last."""
    models = sorted({key[0] for table in PERFORMANCE_TABLES for key in cells[table]})
    made, shown = list[ModelPerformance](), dict[Name, int]()
    for model_id in models:
        one, counts = _assess(model_id, cells, shown_before, random)
        made.append(one)
        shown |= counts
    return Performance(made), shown


def _assess(
    model_id: str, cells: Cells, shown_before: Mapping[Name, int], random: np.random.Generator
) -> tuple[ModelPerformance, dict[Name, int]]:
    counts: Counter[Any] = Counter()
    for table, groups in GROUPS.items():
        for (model, action, truth, group), n in cells[table].items():
            if model == model_id:
                # What is no longer a word of the table is counted with the unknown.
                counts[table, action, truth, group if group in groups else UNKNOWN] += n
    figures: Figures = {}
    for table, groups in GROUPS.items():
        for group in groups:
            for measure, (actions, truths) in _MEASURES.items():
                figures[model_id, table, group, measure] = [
                    (table, action, truth, group) for action in actions for truth in truths
                ]
    for measure, (actions, truths) in _MEASURES.items():
        figures[model_id, "all", "", measure] = [
            ("site", action, truth, group)
            for action in actions
            for truth in truths
            for group in GROUPS["site"]
        ]
    show = find_shown(counts, figures, _moves(counts), random=random, shown_before=shown_before)
    intended = {key[1:]: n for key, n in cells["intended"].items() if key[0] == model_id}
    against, low, more = _intentions(model_id, Counter(intended), shown_before, random)

    def most(*name: str) -> int | None:
        return most_hidden(sum(counts[part] for part in figures[name]), shown_before.get(name))

    def accuracy(table: str, group: str) -> Accuracy:
        of = {measure: show(model_id, table, group, measure) for measure in _MEASURES}
        return _accuracy(
            group or None,
            of,
            {what: most(model_id, table, group, f"{what}.missed") for what in _DETECTED},
        )

    listed = {table: [accuracy(table, group) for group in groups] for table, groups in GROUPS.items()}
    made = ModelPerformance(
        model_id=model_id,
        all=accuracy("all", ""),
        by_site=listed["site"],
        by_age_band=listed["age_band"],
        by_skin_type=listed["skin_type"],
        against_intention=against,
        low_risk_referrals=low,
    )
    return made, {name: told for name in figures if (told := show(*name)) is not None} | more


def _accuracy(group: str | None, of: Mapping[str, Count], most: Mapping[str, int | None]) -> Accuracy:
    """Make the figures of the counts that are shown; `most`: how many may have been missed where that is hidden for itself."""

    def detection(what: str) -> Detection:
        n, referred, limit = of[f"{what}.n"], of[f"{what}.referred"], most[what]
        bound = round(max(n - limit, 0) / n, 6) if n and limit is not None else None
        return Detection(n, referred, of[f"{what}.missed"], proportion(referred, n), bound)

    lesions, known = of["lesions"], of["with_outcome"]
    spared = of["benign.missed"]
    return Accuracy(
        group=group,
        lesions=lesions,
        with_outcome=known,
        share_with_outcome=round(known / lesions, 6) if lesions and known is not None else None,
        melanoma=detection("melanoma"),
        other_malignant=detection("other_malignant"),
        malignant=detection("malignant"),
        benign=Benign(of["benign.n"], of["benign.referred"], spared, proportion(spared, of["benign.n"])),
        positive_predictive_value=proportion(of["malignant.referred"], of["referred_known"]),
    )


def _intentions(
    model_id: str, counts: Counter[Any], shown_before: Mapping[Name, int], random: np.random.Generator
) -> tuple[list[Intention], LowRisk, dict[Name, int]]:
    """`counts` by (intended, level, made, action, truth)."""
    coarse: Counter[Any] = Counter()
    for (word, level, referral, action, truth), n in counts.items():
        told = level == "low" and word != Referral.NONE
        # What became of it is told of avoided referrals alone.
        what = "malignant" if truth in MALIGNANT else truth
        coarse[word, action, referral if told else "", what if told and referral == "false" else ""] += n
    known = list(coarse)
    figures: Figures = {}
    for word in Referral:
        for action in _ACTIONS:
            figures[model_id, "intended", word, action] = [key for key in known if key[:2] == (word, action)]
        figures[model_id, "intended", word, "lesions"] = [key for key in known if key[0] == word]
    low_risk = [key for key in known if key[2]]
    avoided = [key for key in low_risk if key[2] == "false"]
    figures |= {
        (model_id, "low", "", name): parts
        for name, parts in {
            "made": [key for key in low_risk if key[2] == "true"],
            "not_known": [key for key in low_risk if key[2] == UNKNOWN],
            "avoided_malignant": [key for key in avoided if key[3] == "malignant"],
            "avoided_benign": [key for key in avoided if key[3] == "benign"],
            "avoided_without_outcome": [key for key in avoided if key[3] == UNKNOWN],
            "avoided_with_outcome": [key for key in avoided if key[3] != UNKNOWN],
            "not_made": avoided,
            "of_known": [key for key in low_risk if key[2] != UNKNOWN],
            "all": low_risk,
        }.items()
    }
    show = find_shown(
        coarse, figures, [*shifts(known), *steps(known)], random=random, shown_before=shown_before
    )
    against = [
        Intention(word, *(show(model_id, "intended", word, each) for each in ("lesions", "refer", "not")))
        for word in Referral
    ]
    of = {name[3]: show(*name) for name in figures if name[1] == "low"}
    risk = LowRisk(
        intended=of["all"],
        made=of["made"],
        not_made=of["not_made"],
        not_known=of["not_known"],
        avoided=proportion(of["not_made"], of["of_known"]),
        avoided_with_outcome=of["avoided_with_outcome"],
        avoided_malignant=of["avoided_malignant"],
    )
    return against, risk, {name: told for name in figures if (told := show(*name)) is not None}


def _moves(counts: Counter[Any]) -> list[Move]:
    """Ways to change the tables of lesions, which are three divisions of the same."""
    columns = list(product(_ACTIONS, TRUTHS))
    moves: list[Move] = []
    for table, groups in GROUPS.items():
        moves += cycles(groups, columns, lambda group, column, table=table: (table, *column, group))
        for column in columns:
            moves += shifts([(table, *column, group) for group in groups])

    def smallest(column: tuple[str, str], also: tuple[str, str]) -> list[list[str]]:
        """In each table the groups that have the fewest of a column, where there is any of both."""
        return [
            sorted(
                (group for group in groups if counts[table, *column, group] and counts[table, *also, group]),
                key=lambda group: counts[table, *column, group],
            )[:_TRIED]
            for table, groups in GROUPS.items()
        ]

    for less in columns:
        for groups in product(*smallest(less, less)):
            moves += steps(*([(table, *less, group)] for table, group in zip(GROUPS, groups, strict=True)))
        for more in columns:
            for groups in product(*smallest(less, more)) if more != less else ():
                up, down = ([(t, *c, g) for t, g in zip(GROUPS, groups, strict=True)] for c in (more, less))
                moves += [(up, down), (down, up)]
    return moves
