"""The published tables of `summary` and `performance`: what is counted in them, and the figures made of the counts.

A count is null where it is hidden (suppression.py), and so is every share that it would give away.
docs/reports.md defines each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import sqrt
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from serve_app.domain.assessment import Id, Outcome, RiskLevel, Shape, Share, Time, Urgency
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.patient import AnatomSite
from serve_app.domain.review import Decision, OutcomeKind, OverrideReason, Referral
from serve_app.records.reports import Cells
from serve_app.reports.suppression import Move, cycles, hide, shifts, steps

#: None where it is hidden.
Count = Annotated[int, Field(ge=0)] | None
Counts = Mapping[str, Count]
Name = tuple[str, ...]
_Figures = dict[Name, Collection[Any]]

#: Upper edges of the histogram of times to the answer, seconds: as in `cells_of`, which counts what lies above all.
TIME_EDGES = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 300, 3600)
#: How many groups of each table are tried where all tables must change at once.
_TRIED = 3
#: Fewer answers have no 95 % quantile of their own.
_TIMED = 20

UNKNOWN = "unknown"
TRUTHS = ("melanoma", "other_malignant", "benign", UNKNOWN)
_MALIGNANT = TRUTHS[:2]
AGE_BANDS = ("0-19", *(f"{age}-{age + 9}" for age in range(20, 80, 10)), "80+")
SKIN_TYPES = ("I", "II", "III", "IV", "V", "VI")
#: The tables of lesions, each of which divides all of them, and the groups that are always listed.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "site": (*AnatomSite, UNKNOWN),
    "age_band": (*AGE_BANDS, UNKNOWN),
    "skin_type": (*SKIN_TYPES, UNKNOWN),
}
SUMMARY_TABLES = ("outcome", "diagnosis", "level", "urgency", "seconds", "decision", "result")
PERFORMANCE_TABLES = (*GROUPS, "intended")


@dataclass(frozen=True, slots=True)
class Proportion(Shape):
    """A share of `n`, with its 95 % interval (Wilson 1927)."""

    value: Share
    n: int
    lower: Share
    upper: Share


def proportion(part: Count, n: Count) -> Proportion | None:
    """Make a share of counts; None where one is hidden, or there is nothing to divide.

    Wilson's score interval, JASA 22:209 (1927), without continuity correction: close to its level for any share
    and small n, where the textbook's interval fails (Brown, Cai and DasGupta, Statistical Science 16:101, 2001).
    """
    if part is None or not n:
        return None
    share, z = part / n, 1.959963984540054
    middle = share + z * z / (2 * n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    lower, upper = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    bounds = (0.0 if part == 0 else lower, 1.0 if part == n else upper)
    return Proportion(*(round(number, 6) for number in (share,)), n, *(round(bound, 6) for bound in bounds))


@dataclass(frozen=True, slots=True)
class TimeToAnswer(Shape):
    """Seconds within which half and 95 % of the answers were there, to the next edge of a histogram; null for few."""

    p50_at_most: float | None
    p95_at_most: float | None


@dataclass(frozen=True, slots=True)
class Adoption(Shape):
    """Of the encounters with a skin complaint, how many had an image assessed; null where the PMS does not tell."""

    skin_complaint_encounters: Count
    assessed_encounters: Count
    share: Proportion | None
    told_by_pms: bool


@dataclass(frozen=True, slots=True)
class Summary(Shape):
    """What was done in one month.

    `assessments` by outcome when they ended; `diagnoses`, `levels` and `urgencies` of those that were answered, the
    diagnosis being the most probable one. `decisions` and `lesion_outcomes` as they were recorded in the month.
    """

    assessments: Counts
    diagnoses: Counts
    levels: Counts
    urgencies: Counts
    time_to_answer_s: TimeToAnswer
    decisions: Counts
    override_reasons: Counts
    lesion_outcomes: Mapping[str, Counts]
    adoption: Adoption


def summarise(cells: Cells, adoption: tuple[int, int] | None, *, random: np.random.Generator) -> Summary:
    """Make a month's summary; `adoption` is (encounters assessed, encounters with a skin complaint)."""
    counts: Counter[Any] = Counter(
        {(table, *key): n for table, found in cells.items() if table != "seconds" for key, n in found.items()}
    )
    words = {
        "outcome": [each for each in Outcome if each not in {Outcome.PENDING, Outcome.ERASED}],
        "diagnosis": list(Diagnosis),
        "level": list(RiskLevel),
        "urgency": list(Urgency),
    }
    figures: _Figures = {(table, word): [(table, word)] for table, each in words.items() for word in each}
    accepted, overrides = ("decision", Decision.ACCEPT, ""), [("decision", Decision.OVERRIDE, r) for r in OverrideReason]
    figures |= {override: [override] for override in overrides} | {("decision", "accept"): [accepted]}
    figures["decision", "override"] = overrides
    figures["decision", "total"] = [accepted, *overrides]
    results = {kind: [("result", kind, truth) for truth in TRUTHS] for kind in OutcomeKind}
    for kind, each in results.items():
        figures |= {result: [result] for result in each} | {("result", kind, "total"): each}
    figures["result", "total"] = [result for each in results.values() for result in each]
    for table, each in words.items():
        figures[table, "total"] = [(table, word) for word in each]
    # Tables of the same answers: one more of an outcome is one more of a diagnosis, a level and an urgency.
    answers = [("outcome", Outcome.DECIDED), ("outcome", Outcome.REVIEW)]
    others = [("outcome", word) for word in words["outcome"] if ("outcome", word) not in answers]
    tables = [figures[table, "total"] for table in ("diagnosis", "level", "urgency")]
    moves = [*steps(answers, *tables), *shifts(answers), *shifts(others), *steps(others)]
    for parts in (*tables, figures["decision", "total"], figures["result", "total"]):
        moves += shifts(parts)
    for parts in (figures["decision", "total"], figures["result", "total"]):
        moves += steps(parts)
    # From an answer to none, or the other way.
    moves += [(more, less) for each in product(answers, *tables) for none in others for more, less in ((each, [none]), ([none], each))]
    show = _shown(counts, figures, moves, random=random)

    def listed(table: str) -> Counts:
        return {word: show(table, word) for word in (*words[table], "total")}

    return Summary(
        assessments=listed("outcome"),
        diagnoses=listed("diagnosis"),
        levels=listed("level"),
        urgencies=listed("urgency"),
        time_to_answer_s=_times(cells["seconds"]),
        decisions={word: show("decision", word) for word in (*Decision, "total")},
        override_reasons={override[-1]: show(*override) for override in overrides},
        lesion_outcomes={
            kind: {word: show("result", kind, word) for word in (*TRUTHS, "total")} for kind in OutcomeKind
        }
        | {"all": {"total": show("result", "total")}},
        adoption=_adoption(adoption, random),
    )


def _times(histogram: Mapping[tuple[str, ...], int]) -> TimeToAnswer:
    buckets = sorted((int(key[0]), n) for key, n in histogram.items())
    total = sum(n for _, n in buckets)

    def quantile(share: float) -> float | None:
        seen = 0
        for bucket, n in buckets:
            seen += n
            if seen >= share * total:
                return TIME_EDGES[bucket] if bucket < len(TIME_EDGES) else None
        return None

    return TimeToAnswer(*(quantile(share) if total >= _TIMED else None for share in (0.5, 0.95)))


def _adoption(told: tuple[int, int] | None, random: np.random.Generator) -> Adoption:
    if told is None:
        return Adoption(None, None, None, told_by_pms=False)
    assessed, complaints = told
    counts = Counter({"assessed": assessed, "not": max(complaints - assessed, 0)})
    figures: _Figures = {("a",): ["assessed"], ("n",): ["not"], ("c",): ["assessed", "not"]}
    show = _shown(counts, figures, [*shifts(list(counts)), *steps(list(counts))], random=random)
    share = proportion(show("a"), show("c")) if complaints >= assessed else None
    return Adoption(show("c"), show("a"), share, told_by_pms=True)


@dataclass(frozen=True, slots=True)
class Detection(Shape):
    """Of `n` lesions that turned out to be this, how many the service refers: level high or urgency urgent.

    `at_least`, where the sensitivity is hidden because 1 to 4 were missed: what it is if it was 4.
    """

    n: Count
    referred: Count
    missed: Count
    sensitivity: Proportion | None
    at_least: Share | None


@dataclass(frozen=True, slots=True)
class Benign(Shape):
    """Of `n` lesions that turned out to be benign, how many the service refers."""

    n: Count
    referred: Count
    not_referred: Count
    specificity: Proportion | None


@dataclass(frozen=True, slots=True)
class Accuracy(Shape):
    """What became of the lesions of one group (of all: null), each counted once, by the model's first answer to it.

    `share_with_outcome` stands beside every figure: all of them are of these lesions alone. Of the others nothing is
    known, and they are not benign. `positive_predictive_value`: of the referred with an outcome, the share of malignant.
    """

    group: str | None
    lesions: Count
    with_outcome: Count
    share_with_outcome: Share | None
    melanoma: Detection
    other_malignant: Detection
    malignant: Detection
    benign: Benign
    positive_predictive_value: Proportion | None


@dataclass(frozen=True, slots=True)
class Intention(Shape):
    """Lesions for which clinicians said before the answer whether they would refer (`intended`), beside the service's word."""

    intended: str
    lesions: Count
    service_refers: Count
    service_does_not_refer: Count


@dataclass(frozen=True, slots=True)
class LowRisk(Shape):
    """Lesions of level `low` that the clinician had intended to refer: whether the referral was made after all.

    `avoided`: the share of not made among those of which that is known; of these, `avoided_malignant` turned out to be
    malignant, of `avoided_with_outcome` with a known outcome.
    """

    intended: Count
    made: Count
    not_made: Count
    not_known: Count
    avoided: Proportion | None
    avoided_with_outcome: Count
    avoided_malignant: Count


@dataclass(frozen=True, slots=True)
class ModelPerformance(Shape):
    """One model version against what became of the lesions, and against what clinicians intended."""

    model_id: str
    all: Accuracy
    by_site: list[Accuracy]
    by_age_band: list[Accuracy]
    by_skin_type: list[Accuracy]
    against_intention: list[Intention]
    low_risk_referrals: LowRisk


@dataclass(frozen=True, slots=True)
class Performance(Shape):
    """Every model version over all its lesions up to the end of the month, with the outcomes known when it was made."""

    models: list[ModelPerformance]


#: What is counted of each group of lesions: by name, which actions of the service and which truths.
_MEASURES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{
        f"{what}.{word}": (actions, truths)
        for what, truths in {
            "melanoma": ("melanoma",),
            "other_malignant": ("other_malignant",),
            "malignant": _MALIGNANT,
            "benign": ("benign",),
        }.items()
        for word, actions in {"referred": ("refer",), "missed": ("not",), "n": ("refer", "not")}.items()
    },
    "unknown": (("refer", "not"), (UNKNOWN,)),
    "referred_known": (("refer",), TRUTHS[:3]),
    "with_outcome": (("refer", "not"), TRUTHS[:3]),
    "lesions": (("refer", "not"), TRUTHS),
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
    figures: _Figures = {}
    for table, groups in GROUPS.items():
        for group in groups:
            for measure, (actions, truths) in _MEASURES.items():
                figures[model_id, table, group, measure] = [
                    (table, action, truth, group) for action in actions for truth in truths
                ]
    for measure, (actions, truths) in _MEASURES.items():
        figures[model_id, "all", "", measure] = [
            ("site", action, truth, group) for action in actions for truth in truths for group in GROUPS["site"]
        ]
    show = _shown(counts, figures, _moves(counts), random=random, shown_before=shown_before)
    intended = {key[1:]: n for key, n in cells["intended"].items() if key[0] == model_id}
    against, low, more = _intentions(model_id, Counter(intended), shown_before, random)

    def accuracy(table: str, group: str) -> Accuracy:
        def of(measure: str) -> Count:
            return show(model_id, table, group, measure)

        def detection(what: str) -> Detection:
            n, referred, missed = (of(f"{what}.{word}") for word in ("n", "referred", "missed"))
            parts = figures[model_id, table, group, f"{what}.missed"]
            few = missed is None and 0 < sum(counts[part] for part in parts) < 5
            at_least = round((n - 4) / n, 6) if few and n else None
            return Detection(n, referred, missed, proportion(referred, n), at_least)

        lesions, known = of("lesions"), of("with_outcome")
        benign = [of(f"benign.{word}") for word in ("n", "referred", "missed")]
        return Accuracy(
            group=group or None,
            lesions=lesions,
            with_outcome=known,
            share_with_outcome=round(known / lesions, 6) if lesions and known is not None else None,
            melanoma=detection("melanoma"),
            other_malignant=detection("other_malignant"),
            malignant=detection("malignant"),
            benign=Benign(benign[0], benign[1], benign[2], proportion(benign[2], benign[0])),
            positive_predictive_value=proportion(of("malignant.referred"), of("referred_known")),
        )

    groups = {table: [accuracy(table, group) for group in GROUPS[table]] for table in GROUPS}
    made = ModelPerformance(
        model_id=model_id,
        all=accuracy("all", ""),
        by_site=groups["site"],
        by_age_band=groups["age_band"],
        by_skin_type=groups["skin_type"],
        against_intention=against,
        low_risk_referrals=low,
    )
    return made, {name: n for name in figures if (n := show(*name)) is not None} | more


def _intentions(
    model_id: str, counts: Counter[Any], shown_before: Mapping[Name, int], random: np.random.Generator
) -> tuple[list[Intention], LowRisk, dict[Name, int]]:
    """`counts` by (intended, level, made, action, truth)."""
    coarse: Counter[Any] = Counter()
    for (word, level, referral, action, truth), n in counts.items():
        told = level == "low" and word != Referral.NONE
        # What became of it is told of avoided referrals alone.
        what = "malignant" if truth in _MALIGNANT else truth
        coarse[word, action, referral if told else "", what if told and referral == "false" else ""] += n
    known = list(coarse)
    figures: _Figures = {}
    for word in Referral:
        for action in ("refer", "not"):
            figures[model_id, "intended", word, action] = [key for key in known if key[:2] == (word, action)]
        figures[model_id, "intended", word, "lesions"] = [key for key in known if key[0] == word]
    low = [key for key in known if key[2]]
    avoided = [key for key in low if key[2] == "false"]
    figures |= {
        (model_id, "low", "", name): parts
        for name, parts in {
            "made": [key for key in low if key[2] == "true"],
            "not_known": [key for key in low if key[2] == UNKNOWN],
            "avoided_malignant": [key for key in avoided if key[3] == "malignant"],
            "avoided_benign": [key for key in avoided if key[3] == "benign"],
            "avoided_without_outcome": [key for key in avoided if key[3] == UNKNOWN],
            "avoided_with_outcome": [key for key in avoided if key[3] != UNKNOWN],
            "not_made": avoided,
            "of_known": [key for key in low if key[2] != UNKNOWN],
            "all": low,
        }.items()
    }
    show = _shown(coarse, figures, [*shifts(known), *steps(known)], random=random, shown_before=shown_before)
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
    return against, risk, {name: n for name in figures if (n := show(*name)) is not None}


def _moves(counts: Counter[Any]) -> list[Move]:
    """Ways to change the tables of lesions, which are three divisions of the same."""
    columns = list(product(("refer", "not"), TRUTHS))
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


def _shown(
    counts: Counter[Any],
    figures: _Figures,
    moves: Iterable[Move],
    *,
    random: np.random.Generator,
    shown_before: Mapping[Name, int] | None = None,
) -> Callable[..., Count]:
    """Hide what must be, and say of each figure what is shown of it."""
    hidden = hide(counts, figures, moves, shown_before=shown_before, random=random)

    def show(*name: str) -> Count:
        return None if name in hidden else sum(counts[part] for part in figures[name])

    return show


@dataclass(frozen=True, slots=True)
class SummaryReport(Shape):
    """The summary of one month, as it was published; it is made once, and never changed.

    `report_id` is the one under which the PMS was told, where it is. `notes`: how to read it.
    """

    report_id: Id
    kind: str
    period: str
    made_at: Time
    tables: Summary
    notes: list[str]


@dataclass(frozen=True, slots=True)
class PerformanceReport(Shape):
    """Performance up to the end of one month, as it was published; it is made once, and never changed."""

    report_id: Id
    kind: str
    period: str
    made_at: Time
    tables: Performance
    notes: list[str]
