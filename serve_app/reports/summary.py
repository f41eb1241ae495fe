"""The summary of a month, made of its cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from serve_app.domain.assessment import Outcome, RiskLevel, Urgency
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.review import Decision, OutcomeKind, OverrideReason
from serve_app.records.reports import Cells
from serve_app.reports.documents import TRUTHS, Adoption, Counts, Summary, TimeToAnswer, proportion
from serve_app.reports.suppression import Figures, Name, find_shown, shifts, steps

SUMMARY_TABLES = ("outcome", "diagnosis", "level", "urgency", "seconds", "decision", "result")
#: Upper edges of the histogram of times to the answer, seconds: as in `cells_of`, which counts what lies above all.
TIME_EDGES = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 300, 3600)
#: Fewer answers have no 95 % quantile of their own.
_TIMED = 20


def summarise(cells: Cells, adoption: tuple[int, int] | None, *, random: np.random.Generator) -> Summary:
    """Make a month's summary; `adoption` is (encounters assessed, encounters with a skin complaint)."""
    counts: Counter[Any] = Counter(
        {(table, *key): n for table, found in cells.items() if table != "seconds" for key, n in found.items()}
    )
    words: dict[str, list[Any]] = {
        "outcome": [each for each in Outcome if each not in {Outcome.PENDING, Outcome.ERASED}],
        "diagnosis": list(Diagnosis),
        "level": list(RiskLevel),
        "urgency": list(Urgency),
    }
    accepted: Name = ("decision", Decision.ACCEPT, "")
    overrides: list[Name] = [("decision", Decision.OVERRIDE, reason) for reason in OverrideReason]
    results: list[Name] = [("result", kind, truth) for kind in OutcomeKind for truth in TRUTHS]
    figures: Figures = {(table, word): [(table, word)] for table, each in words.items() for word in each}
    figures |= {name: [name] for name in (*overrides, *results)}
    figures |= {(table, "total"): [(table, word) for word in each] for table, each in words.items()}
    figures |= {
        ("result", kind, "total"): [name for name in results if name[1] == kind] for kind in OutcomeKind
    }
    figures["decision", "accept"], figures["decision", "override"] = [accepted], overrides
    figures["decision", "total"], figures["result", "total"] = [accepted, *overrides], results
    # Tables of the same answers: one more of an outcome is one more of a diagnosis, a level and an urgency.
    answers = [("outcome", Outcome.DECIDED), ("outcome", Outcome.REVIEW)]
    others = [("outcome", word) for word in words["outcome"] if ("outcome", word) not in answers]
    tables = [figures[table, "total"] for table in ("diagnosis", "level", "urgency")]
    moves = [*steps(answers, *tables), *shifts(answers), *shifts(others), *steps(others)]
    for apart in (figures["decision", "total"], figures["result", "total"]):
        moves += [*shifts(apart), *steps(apart)]
    for parts in tables:
        moves += shifts(parts)
    # From an answer to none, or the other way.
    for more in product(answers, *tables):
        moves += [move for none in others for move in ((more, [none]), ([none], more))]
    show = find_shown(counts, figures, moves, random=random)

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
        lesion_outcomes={"all": {"total": show("result", "total")}}
        | {
            kind.value: {word: show("result", kind, word) for word in (*TRUTHS, "total")}
            for kind in OutcomeKind
        },
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
    # Images are also taken of encounters without a complaint, so that either may be the fewer.
    assessed, complaints = told
    fewer, more = ("a", "c") if assessed <= complaints else ("c", "a")
    counts = Counter({"fewer": min(told), "rest": abs(complaints - assessed)})
    figures: Figures = {(fewer,): ["fewer"], ("rest",): ["rest"], (more,): ["fewer", "rest"]}
    show = find_shown(counts, figures, [*shifts(list(counts)), *steps(list(counts))], random=random)
    share = proportion(show("a"), show("c")) if complaints >= assessed else None
    return Adoption(show("c"), show("a"), share, told_by_pms=True)
