"""Nothing that speaks for cancer ever lowers the answer."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deployments.risk.rules import LEVELS, SERIOUSNESS, URGENCIES
from serve_app.domain.assessment import Change, Classification, Outcome
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.patient import AnatomSite, Checklist, ClinicalContext, History

FEW = settings(max_examples=100, deadline=None)
RANK = {d: len(SERIOUSNESS) - i for i, d in enumerate(SERIOUSNESS)}


@st.composite
def classifications(draw):
    """Around the thresholds: a benign bulk, and a little of some of the others."""
    little = st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.45])
    weights = {d: draw(little) for d in Diagnosis}
    bulk = draw(st.sampled_from([Diagnosis.NV, Diagnosis.BKL, *Diagnosis]))
    weights[bulk] += draw(st.sampled_from([0.1, 0.5, 1.0, 2.0]))
    p = {d: weight / sum(weights.values()) for d, weight in weights.items()}
    members = draw(st.sampled_from([(), (bulk,), (Diagnosis.NV, Diagnosis.BKL), TRAINED]))
    return Classification(p, tuple(d for d in TRAINED if d in members), 0.95, 1.0)


flags = st.sampled_from([None, False, False, True])
# Few points, or the checklist would decide every case.
checklists = st.sampled_from(
    [None, None, Checklist(), Checklist(oozing=True), Checklist(change_in_size=True)]
)
contexts = st.builds(
    ClinicalContext,
    anatom_site_general=st.none() | st.sampled_from(AnatomSite),
    age_approx=st.none() | st.integers(0, 110),
    history=st.builds(History, flags, flags, flags, flags),
    checklist=checklists,
)
shares = st.sampled_from([None, 0.0, 0.1, 0.3, 0.4, 0.6])


def not_lower(before, after) -> None:
    if after.outcome is Outcome.REFUSED or before.outcome is Outcome.REFUSED:
        return
    assert LEVELS.index(after.risk.level) >= LEVELS.index(before.risk.level)
    assert URGENCIES.index(after.risk.urgency) >= URGENCIES.index(before.risk.urgency)
    assert after.risk.score >= before.risk.score - 1e-4


@FEW
@given(
    classifications(),
    contexts,
    shares,
    st.sampled_from(Diagnosis),
    st.sampled_from(SERIOUSNESS),
    st.floats(0.0, 1.0),
)
def test_probability_that_moves_to_a_more_serious_diagnosis(
    assess, neighbours, c, context, share, source, target, part
):
    # From UNK only to melanoma: elsewhere, melanoma is less likely among the known ones than before.
    assume(RANK.get(source, 0) < RANK[target])
    assume(target is not Diagnosis.UNK and (source is not Diagnosis.UNK or target is Diagnosis.MEL))
    moved = part * c.probabilities[source]
    p = dict(c.probabilities)
    p[source] -= moved
    p[target] += moved
    more = replace(c, probabilities=p)
    before, after = (
        assess(classification=x, context=context, neighbours=neighbours(share)) for x in (c, more)
    )
    not_lower(before, after)


@FEW
@given(classifications(), contexts, st.floats(0.0, 1.0))
def test_melanoma_raised_at_the_cost_of_all_others(assess, c, context, part):
    p = {d: value * (1 - part) for d, value in c.probabilities.items()}
    p[Diagnosis.MEL] += part
    members = tuple(d for d in TRAINED if d in {*c.prediction_set, Diagnosis.MEL})
    more = replace(c, probabilities=p, prediction_set=members)
    not_lower(assess(classification=c, context=context), assess(classification=more, context=context))


@FEW
@given(classifications(), contexts, st.floats(0.0, 1.0))
def test_more_doubt_about_the_image(assess, c, context, part):
    p = {d: value * (1 - part) for d, value in c.probabilities.items()}
    p[Diagnosis.UNK] += part
    more = replace(c, probabilities=p)
    not_lower(assess(classification=c, context=context), assess(classification=more, context=context))


@FEW
@given(classifications(), contexts, st.data())
def test_a_risk_factor_more(assess, c, context, data):
    name = data.draw(
        st.sampled_from([*History.__dataclass_fields__, *Checklist.__dataclass_fields__, "age", "head/neck"])
    )
    if name in History.__dataclass_fields__:
        more = replace(context, history=replace(context.history, **{name: True}))
    elif name in Checklist.__dataclass_fields__:
        more = replace(context, checklist=replace(context.checklist or Checklist(), **{name: True}))
    elif name == "age":
        more = replace(context, age_approx=max(context.age_approx or 0, data.draw(st.integers(0, 110))))
    else:
        # Not from a site where delay does harm as well, but the skin is not exposed.
        assume(context.anatom_site_general is not AnatomSite.ORAL_GENITAL)
        more = replace(context, anatom_site_general=AnatomSite.HEAD_NECK)
    not_lower(assess(classification=c, context=context), assess(classification=c, context=more))


@FEW
@given(classifications(), contexts, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_more_malignant_neighbours(assess, neighbours, c, context, one, other):
    fewer, more = sorted((one, other))
    none, before, after = (
        assess(classification=c, context=context, neighbours=neighbours(share))
        for share in (None, fewer, more)
    )
    not_lower(none, before)
    not_lower(before, after)


@FEW
@given(
    classifications(), st.floats(-1.0, 1.0), st.floats(-1.0, 1.0), st.floats(-1.0, 1.0), st.floats(-1.0, 1.0)
)
def test_a_larger_change(assess, c, rise, more_rise, similarity, less_similarity):
    small = Change("2026-05-01", "x", max(similarity, less_similarity), min(rise, more_rise))
    large = Change("2026-05-01", "x", min(similarity, less_similarity), max(rise, more_rise))
    none, before, after = (assess(classification=c, change=change) for change in (None, small, large))
    not_lower(none, before)
    not_lower(before, after)


@FEW
@given(classifications(), contexts)
def test_three_points_are_urgent_whatever_the_model_says(assess, c, context):
    three = replace(context.checklist or Checklist(), change_in_size=True, oozing=True)
    conclusion = assess(classification=c, context=replace(context, checklist=three))
    if conclusion.outcome is Outcome.REFUSED:
        assert conclusion.reasons[-1].code == "checklist_demands_referral"
    else:
        assert (conclusion.risk.level, conclusion.risk.urgency) == ("high", "urgent")


@FEW
@given(classifications(), contexts, shares)
def test_every_answer_is_well_formed(assess, neighbours, c, context, share):
    conclusion = assess(classification=c, context=context, neighbours=neighbours(share))
    assert (conclusion.outcome is Outcome.DECIDED) == (not conclusion.reasons)
    assert (conclusion.outcome is Outcome.REFUSED) == (conclusion.risk is None)
    if conclusion.risk is not None:
        assert 0.0 <= conclusion.risk.score <= 1.0
        assert len({f.code for f in conclusion.risk.factors}) == len(conclusion.risk.factors)
