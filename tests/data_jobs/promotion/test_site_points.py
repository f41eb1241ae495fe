"""A site's own operating points: proven on its cases or refused, in force at once, named in answers, replayed later."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
import json
from pathlib import Path

import pytest

from data_jobs.promotion.candidate import PromotionRefused
from data_jobs.promotion.site_points import SiteRequest, set_site_points
from model_store.registry import ModelStore
from serve_app.domain.errors import Conflict, DermError
from serve_app.records.serving import Approval, live_model, set_operating_points
from tests.pools import connected

from .conftest import write_part

pytestmark = pytest.mark.usefixtures("archive")
OTHERS = 12


@pytest.fixture(scope="session")
def site(isic_dir: Path, tmp_path_factory) -> Path:
    """The site's own confirmed cases: all melanoma lesions of a fold prove 0.95 with a few misses."""

    def choose(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        held = [row for row in rows if row["fold"] == "0"]
        lesions = {row["lesion_id"] or row["isic_id"]: row for row in held if row["diagnosis"] == "MEL"}
        return [*lesions.values(), *[r for r in held if r["diagnosis"] == "NV"][:OTHERS]]

    return write_part(isic_dir, tmp_path_factory.mktemp("site"), choose)


@pytest.fixture
def ask(site: Path, answers_cache: Path) -> Callable[..., SiteRequest]:
    def make(**changed: object) -> SiteRequest:
        given = {"points": {}, "approved_by": "Dr Test", "reason": "our validation", "cache": answers_cache}
        return SiteRequest(**{**given, "cases": site, **changed})

    return make


async def test_a_proven_point_holds_and_the_models_own_can_come_back(served, store, model_id, ask) -> None:
    own = ModelStore(store).open(model_id).manifest.operating_points["melanoma"].threshold
    said: list[str] = []
    # A hair above the shipped point: it needs the proof.
    points = {"melanoma": own * 1.0001}
    await set_site_points(served, store, ask(points=points, dry_run=True), said.append)
    async with connected(served) as pool:
        assert not (await live_model(pool)).operating_points
        report = json.loads((store / f"{model_id}.site.json").read_text())
        assert report["accepted"]
        await set_site_points(served, store, ask(points=points), said.append)
        text = (store / f"{model_id}.site.json").read_bytes()
        assert (await live_model(pool)).operating_points == points
        event = await pool.fetchrow("SELECT * FROM audit_events ORDER BY event_id DESC LIMIT 1")
        assert (event["action"], event["detail"]["before"], event["detail"]["after"]) == (
            *("operating_points_set", {}, points),
        )
        assert event["detail"]["report_sha256"] == sha256(text).hexdigest()
        await set_site_points(served, store, ask(cases=None), said.append)
        assert not (await live_model(pool)).operating_points
        events = await pool.fetch("SELECT FROM audit_events WHERE action = 'operating_points_set'")
        assert len(events) == 2


async def test_what_is_not_proven_is_refused(served, store, model_id, ask, small_archive, tmp_path) -> None:
    def refused(match: str, kind: type[DermError] = PromotionRefused):
        return pytest.raises(kind, match=match)

    said: list[str] = []
    with refused("prove a sensitivity of 0"):
        await set_site_points(served, store, ask(points={"melanoma": 0.5}), said.append)
    assert not json.loads((store / f"{model_id}.site.json").read_text())["accepted"]
    # Stricter than the model's own needs no proof, and is measured all the same.
    await set_site_points(served, store, ask(points={"melanoma": 0.0001}, dry_run=True), said.append)
    for points, match in (
        ({"naevus": 0.1}, "no operating point 'naevus'"),
        ({"melanoma": 1.5}, "between 0 and 1"),
    ):
        with refused(match):
            await set_site_points(served, store, ask(points=points), said.append)
    with refused("own confirmed cases"):
        await set_site_points(served, store, ask(points={"melanoma": 0.5}, cases=None), said.append)
    with refused("the model's own references"):
        await set_site_points(served, store, ask(points={"melanoma": 0.5}, cases=small_archive), said.append)
    (tmp_path / "train.csv").write_text("isic_id,lesion_id,diagnosis\none,,WART\n")
    with refused("cannot be read: 'WART'", DermError):
        await set_site_points(served, store, ask(points={"melanoma": 0.5}, cases=tmp_path), said.append)
    async with connected(served) as pool:
        live = await live_model(pool)
        await set_operating_points(pool, live, {"melanoma": 0.1}, Approval(report_sha256="0" * 64))
        with pytest.raises(Conflict, match="changed meanwhile"):
            await set_operating_points(pool, live, {"melanoma": 0.2}, Approval(report_sha256="0" * 64))
