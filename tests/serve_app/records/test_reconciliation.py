"""A row changed, added or removed beside the audit log is named; what the service did itself never is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
import json
from uuid import UUID, uuid4

import asyncpg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from serve_app.audit.events import AuditEvent, account_event, event_about
from serve_app.audit.rows import json_digest
from serve_app.domain.assessment import Outcome
from serve_app.domain.patient import History
from serve_app.keys.receipts import ErasureReason
from serve_app.records.access import AccessStore, CareAssignment
from serve_app.records.erasures import ErasureRequest, ErasureStore, Held, HoldStore
from serve_app.records.lesion_rows import Admission
from serve_app.records.lesions import LesionStore
from serve_app.records.outbox import Outbox
from serve_app.records.patients import PatientEntry, PatientTable
from serve_app.records.pool import Pool
from serve_app.records.reconciliation import reconcile
from serve_app.records.retention import RetentionStore
from serve_app.records.reviews import ReviewStore, Statement
from serve_app.records.serving import Approval, LiveModel, publish, set_operating_points
from tests.pools import connected

SPACE = "lite0.1"
SINCE, UNTIL = datetime(2026, 1, 1, tzinfo=UTC), datetime(2036, 1, 1, tzinfo=UTC)
DIFFERS, GONE, UNKNOWN = "is not what its event says", "is gone", "is in no event"
BACK = "is there, and its event ended it"


@dataclass(frozen=True)
class Clinic:
    """A database in which everything was done once or more, by the stores alone."""

    app: Pool
    owner: Pool
    tamperer: asyncpg.Connection
    images: dict[str, Admission]
    ids: dict[str, UUID]

    async def harm(self, name: str, statement: str) -> None:
        """Do something to an image behind the service's back."""
        image = self.images[name]
        ids = {"image": image.image_id, "assessment": image.assessment_id, "lesion": image.lesion_id}
        await self.tamperer.execute(statement.format(**ids, other=self.images["delivered"].lesion_id))

    async def found(self) -> dict[tuple[str, str], str]:
        """What reconciling finds, by table and row."""
        found = (await reconcile(self.app)).differences
        assert len({(each.table, each.row) for each in found}) == len(found)
        return {(each.table, each.row): each.what for each in found}


# ruff: noqa: S608 - our own statements
_OF, _MESSAGE_OF = "WHERE image_id = '{image}'", "WHERE assessment_id = '{assessment}'"
_RECORD = "UPDATE assessments SET"
_GONE = "DELETE FROM assessments {0}; DELETE FROM lesion_images {0}; DELETE FROM lesions WHERE lesion_id = '{{lesion}}'"
#: One image for each: what is done to it, and what of it is found to be wrong.
IMAGES = {
    "risk": (
        f"{_RECORD} answer = jsonb_set(answer, '{{{{risk,level}}}}', '\"low\"') {_OF}",
        {"assessments": DIFFERS},
    ),
    "demand": (f"{_RECORD} demand_level = 'low' {_OF}", {"assessments": DIFFERS}),
    "answered": (f"{_RECORD} demand_answered_at = now() {_OF}", {"assessments": DIFFERS}),
    "vector": (
        f"UPDATE lesion_embeddings SET embedding = embedding + embedding {_OF}",
        {"assessments": DIFFERS},
    ),
    "no vector": (f"DELETE FROM lesion_embeddings {_OF}", {"assessments": DIFFERS}),
    "pending again": (
        f"{_RECORD} outcome = 'pending', answer = NULL, completed_at = NULL {_OF}",
        {"assessments": "is pending, and its event finished it"},
    ),
    "context": (f"{_RECORD} context = context - 'age_approx' {_OF}", {"lesion_images": DIFFERS}),
    "sealed": (f"UPDATE lesion_images SET sealed = sealed || '\\x00' {_OF}", {"lesion_images": DIFFERS}),
    "moved": (
        f"UPDATE lesion_images SET lesion_id = '{{other}}' {_OF}",
        {"lesion_images": DIFFERS, "lesions": UNKNOWN},
    ),
    "another's": (f"UPDATE lesion_images SET patient_id = 'x' {_OF}", {"lesion_images": DIFFERS}),
    "gone": (_GONE.format(_OF), {"lesion_images": GONE, "assessments": GONE}),
    "hidden": (
        f"UPDATE lesion_images SET sealed = NULL, erased_at = now() {_OF}",
        {"lesion_images": "is erased, and no event says so"},
    ),
    "erased": (f"{_RECORD} context = '[1]' {_OF}", {"lesion_images": "is there, and its event erased it"}),
    "erased too": (f"{_RECORD} confirmed_by = 'x', confirmed_at = now() {_OF}", {"who confirmed": DIFFERS}),
    "failed": (f"{_RECORD} failure = 'another' {_OF}", {"assessments": DIFFERS}),
    "pending": (
        f"{_RECORD} outcome = 'failed', failure = 'x', completed_at = now() {_OF}",
        {"assessments": UNKNOWN},
    ),
    "confirmed": (f"{_RECORD} confirmed_by = 'x' {_OF}", {"who confirmed": DIFFERS}),
    "told": (
        f"UPDATE outbox SET encounter_id = 'another' {_MESSAGE_OF}",
        {"outbox": "is for another encounter than its image's"},
    ),
    "not told": (
        f"UPDATE outbox SET delivered_at = now() {_MESSAGE_OF}",
        {"outbox": "is noted as delivered, and no event says so"},
    ),
    "never told": (f"DELETE FROM outbox {_MESSAGE_OF}", {"outbox": GONE}),
    "delivered": ("SELECT", {}),
    # What was said of it: the demand that it answered, and the message of it.
    "reviewed": (f"{_RECORD} demand_answered_at = NULL {_OF}", {"assessments": DIFFERS}),
    "review told": (
        f"UPDATE outbox SET delivered_at = now() {_MESSAGE_OF} AND kind = 'review'",
        {"review of": "is noted as delivered, and no event says so"},
    ),
    "outcome not told": (f"DELETE FROM outbox {_MESSAGE_OF} AND kind = 'outcome'", {"outcome of": GONE}),
}
#: What is done to everything else, and what is found: by table, the rows in words of the fixture or of their own.
OTHERS = {
    "UPDATE care_assignments SET ends_at = NULL WHERE patient_id = 'p-ended'": ("care_assignments", DIFFERS),
    "DELETE FROM care_assignments WHERE patient_id = 'p-open'": ("care_assignments", GONE),
    "INSERT INTO care_assignments VALUES ('p-open', 'dr-x', '2020-01-01')": ("care_assignments", UNKNOWN),
    "INSERT INTO care_assignments VALUES ('p-withdrawn', 'dr', '2036-01-01')": ("care_assignments", BACK),
    # Beside rows of the same names that events do vouch for.
    "INSERT INTO care_assignments VALUES ('p-ended', 'dr', '2035-01-01')": ("care_assignments", UNKNOWN),
    "DELETE FROM revocations WHERE value = 'out'": ("revocations", GONE),
    "INSERT INTO revocations VALUES ('subject', 'in', now(), 'x')": ("revocations", BACK),
    "UPDATE emergency_accesses SET ends_at = ends_at + interval '1 day' WHERE patient_id = 'p'": (
        "emergency_accesses",
        DIFFERS,
    ),
    "UPDATE legal_holds SET released_at = now(), released_by = 'x' WHERE patient_id = 'p-held'": (
        *("legal_holds", DIFFERS),
    ),
    "DELETE FROM legal_holds WHERE patient_id = 'p-free'": ("legal_holds", GONE),
    "UPDATE closed_records SET closed_at = closed_at - interval '30 years' WHERE patient_id = 'p-closed'": (
        *("closed_records", DIFFERS),
    ),
    "INSERT INTO closed_records VALUES ('p-reopened', now(), 'x')": ("closed_records", BACK),
    "UPDATE patient_records SET birth_date = '2001-01-01' WHERE patient_id = 'p-1'": (
        *("patient_records", DIFFERS),
    ),
    "INSERT INTO patient_encounters VALUES ('e-x', 'p-2')": ("patient_records", DIFFERS),
    "UPDATE serving SET model_id = 'lite0.a', model_digest = 'digest'": ("serving", DIFFERS),
    "UPDATE site_operating_points SET operating_points = '{}'": ("site_operating_points", DIFFERS),
    "INSERT INTO site_operating_points (model_id, model_digest, operating_points, approved_by, reason, report_sha256)"
    " VALUES ('lite0.b', 'digest', '{\"melanoma\": 0.9}', 'x', 'x', repeat('a', 64))": (
        *("site_operating_points", UNKNOWN),
    ),
    "UPDATE publications SET approved_by = 'somebody' WHERE model_id = 'lite0.b'": ("publications", DIFFERS),
    "DELETE FROM publications WHERE model_id = 'lite0.a'": ("publications", GONE),
    "UPDATE reviews SET level = 'low' WHERE decision = 'override'": ("reviews", DIFFERS),
    "UPDATE reviews SET note = 'not so' WHERE decision = 'override'": ("review_notes", DIFFERS),
    "SELECT 'the note of the review that is deleted next'": ("review_notes", GONE),
    "DELETE FROM reviews WHERE review_id = (SELECT review_id FROM reviews WHERE decision = 'accept' AND note <> '' LIMIT 1)": (
        *("reviews", GONE),
    ),
    "INSERT INTO reviews (review_id, assessment_id, clinician, request_id, decision)"
    " SELECT gen_random_uuid(), assessment_id, 'x', 'r', 'accept' FROM assessments LIMIT 1": (
        "reviews",
        UNKNOWN,
    ),
    "UPDATE lesion_outcomes SET malignant = NOT malignant WHERE kind = 'histology'": (
        "lesion_outcomes",
        DIFFERS,
    ),
    "DELETE FROM lesion_outcomes WHERE kind = 'follow_up'": ("lesion_outcomes", GONE),
    # One in force, one that was ended, and one more.
    "UPDATE lesion_links SET linked_by = 'x' WHERE ended_at IS NULL": ("lesion_links", DIFFERS),
    "UPDATE lesion_links SET left_open = '{}' WHERE patient_id = 'p-apart'": ("lesion_links", DIFFERS),
    "DELETE FROM lesion_links WHERE patient_id = 'p-again'": ("lesion_links", GONE),
    "INSERT INTO lesion_links (link_id, lesion_id, earlier_lesion_id, patient_id, reason, linked_by, request_id)"
    " VALUES (gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'p', 'x', 'x', 'r')": (
        "lesion_links",
        UNKNOWN,
    ),
    "UPDATE erasures SET reason = 'uploaded_in_error' WHERE reason = 'patient_request'": (
        "erasures",
        DIFFERS,
    ),
    "UPDATE erasure_receipts SET erased_at = erased_at - interval '1 day' WHERE receipt_id IN"
    " (SELECT receipt_id FROM erasures WHERE reason = 'retention')": ("erasure_receipts", DIFFERS),
}


@pytest.fixture
async def clinic(new_database, as_superuser, admission, assessment, unit_vectors):
    urls = await new_database()
    tamperer = await asyncpg.connect(as_superuser(urls))
    await tamperer.execute("SET session_replication_role = replica")  # no trigger, no foreign key
    async with connected(urls.app) as app, connected(urls.owner) as owner:
        ids = await _change_access(owner)
        images = {name: admission(patient_id=f"of {name}") for name in IMAGES}
        vectors = unit_vectors(len(images))
        for number, (name, image) in enumerate(images.items()):
            await _assess(app, name, image, assessment(embedding=vectors[number]))
        for patient in ("p-one", "p-apart", "p-again"):
            pair = [admission(patient_id=patient, created_at=SINCE + timedelta(days=day)) for day in range(2)]
            for image in pair:
                await _assess(app, "linked", image, assessment())
            await _link(app, *pair, ended=patient != "p-one")
        yield Clinic(app, owner, tamperer, images, ids)
    await tamperer.close()


async def _change_access(owner: Pool) -> dict[str, UUID]:
    access, holds, retention = AccessStore(owner), HoldStore(owner), RetentionStore(owner)

    async def assign(patient: str, *, since: datetime = SINCE, until: datetime | None = None) -> None:
        event = account_event("assign", {"subject": "dr"}, patient_id=patient)
        await access.assign(CareAssignment(patient, "dr", since, until), event=event)

    await assign("p-open")
    await assign("p-open", until=UNTIL)  # again, with another end
    await assign("p-ended")
    await assign("p-withdrawn", since=UNTIL)
    for patient in ("p-ended", "p-withdrawn"):
        event = account_event("end_assignment", {"subject": "dr"}, patient_id=patient)
        assert await access.end_assignment(patient, "dr", event=event) == 1
    for subject in ("out", "in"):
        event = account_event("revoke", {"subject": subject})
        assert await access.revoke("subject", subject, by="op", event=event)
    assert await access.restore("subject", "in", event=account_event("restore", {"subject": "in"}))
    emergency = uuid4()
    event = account_event("break_glass", {"emergency_access": str(emergency)}, actor="dr", patient_id="p")
    lasts = timedelta(minutes=5)
    await access.break_glass(emergency, "p", "dr", "unconscious, alone", lasts=lasts, event=event)
    judged = account_event("review_access", {"emergency_id": str(emergency)}, patient_id="p")
    await access.review(emergency, reviewer="sup", outcome="justified", note="x", event=judged)
    for lasts in (5, 6, 7):
        event = account_event("break_glass", {"emergency_access": str(emergency := uuid4())}, patient_id="q")
        since = timedelta(minutes=lasts)
        await access.break_glass(emergency, "q", "dr", "not true at all", lasts=since, event=event)
        if lasts == 5:
            told = account_event("end_emergency", {"emergency_id": str(emergency)}, patient_id="q")
            assert await access.end_emergency(emergency, by="op", event=told)
    judged = account_event("review_access", {"emergency_id": str(emergency)}, patient_id="q")
    await access.review(emergency, reviewer="sup", outcome="not_justified", note=None, event=judged)
    kept = await holds.set(Held(patient_id="p-held"), reason="case 1", actor="op")
    freed = await holds.set(Held(patient_id="p-free"), reason="case 2", actor="op")
    await holds.release(freed, actor="op")
    for patient in ("p-closed", "p-reopened"):
        await retention.close(patient, closed_at=SINCE, actor="op")
    await retention.reopen("p-reopened", actor="op")
    patients = PatientTable(owner)
    first = PatientEntry("p-1", date(1961, 4, 2), None, History(), ["e-1", "e-2"])
    await patients.load([first, replace(first, patient_id="p-2", encounters=["e-3", "e-2"])])
    for model, action in (("lite0.a", "publish"), ("lite0.b", "promote")):
        await publish(owner, LiveModel(model, "digest", SPACE), Approval(action, "who", "why"))
    approval = Approval("promote", "who", "why", "0" * 64)
    await set_operating_points(owner, LiveModel("lite0.b", "digest", SPACE), {"melanoma": 0.25}, approval)
    return {"emergency": emergency, "kept": kept, "freed": freed}


async def _assess(app: Pool, name: str, image: Admission, done) -> None:
    records, erasures = LesionStore(app), ErasureStore(app)
    await records.admit(image)
    if name == "pending":
        return
    event = event_about(image, "classify", "failed" if name == "failed" else "success")
    if name == "failed":
        assert await records.fail(image.assessment_id, "integrity", event=event)
        return
    message = uuid4() if name in {"told", "not told", "never told", "delivered", "erased"} else None
    assert await records.complete(
        image.assessment_id, done, embedding_space=SPACE, event=event, message_id=message
    )
    if name == "confirmed":
        event = event_about(image, "confirm")
        await records.confirm(image.lesion_id, image.image_id, confirmed_by="dr", event=event)
    if name in {"reviewed", "review told", "outcome not told", "erased too"}:
        await _say(app, image, name)
    if name == "delivered":
        event = event_about(image, "disclose")
        assert await Outbox(app).deliver(message, told=Outcome.REVIEW, event=event)
    if name in {"erased", "erased too"}:
        reason = ErasureReason.RETENTION if name == "erased" else ErasureReason.PATIENT_REQUEST
        await erasures.accept(
            ErasureRequest(lesion_id=image.lesion_id, image_id=image.image_id, reason=reason, actor="s")
        )
        await erasures.prove(await erasures.find(image.lesion_id, image.image_id), message_id=uuid4())


async def _say(app: Pool, image: Admission, name: str) -> None:
    of = {"lesion_id": image.lesion_id, "tells_pms": True}
    said: dict[str, object] = {
        "assessment_id": str(image.assessment_id),
        "decision": "accept",
        "note": "note",
    }
    if name == "reviewed":
        said |= {"decision": "override", "reason": "other", "level": "high"}
    await ReviewStore(app).review(Statement(said=said, event=event_about(image, "review"), **of))
    said = {"malignant": True, "observed_on": "2026-01-01", "source": "registry"}
    said["kind"] = "histology" if name == "reviewed" else "follow_up"
    if name in {"reviewed", "outcome not told"}:
        event = replace(event_about(image, "record_outcome"), image_id=None, assessment_id=None)
        await ReviewStore(app).record_outcome(Statement(said=said, event=event, **of))


async def _link(app: Pool, earlier: Admission, later: Admission, *, ended: bool) -> None:
    event = replace(event_about(later, "link"), image_id=None, assessment_id=None)
    said = {"earlier_lesion_id": str(earlier.lesion_id), "reason": "other"}
    await ReviewStore(app).link(Statement(lesion_id=later.lesion_id, said=said, event=event))
    if ended:
        event = replace(event, action="unlink")
        link, _, _ = await ReviewStore(app).unlink(
            Statement(lesion_id=later.lesion_id, said=said, event=event)
        )
        assert link.ended_at is not None


async def test_what_the_service_did_is_what_its_events_say_while_it_goes_on(
    clinic, admission, assessment
) -> None:
    found = await reconcile(clinic.app)
    assert (found.without_digest, found.differences) == (0, ())
    assert found.compared > len(IMAGES) + len(OTHERS)

    async def go_on() -> None:
        for number in range(8):
            await _assess(clinic.app, ("told", "erased")[number % 2], admission(), assessment())

    writing = asyncio.gather(go_on(), go_on())
    while not writing.done():
        assert (await reconcile(clinic.app)).differences == ()
    await writing


async def test_every_row_changed_added_or_removed_is_named(clinic) -> None:
    expected: dict[tuple[str, str], str] = {}
    sent = "SELECT image_id, kind, message_id FROM outbox JOIN assessments USING (assessment_id)"
    messages = {
        (row["image_id"], row["kind"]): row["message_id"] for row in await clinic.tamperer.fetch(sent)
    }
    for name, (harm, found) in IMAGES.items():
        image = clinic.images[name]
        rows = {
            "lesion_images": image.image_id,
            "assessments": image.assessment_id,
            "lesions": image.lesion_id,
            "outbox": messages.get((image.image_id, "assessment")),
        }
        told = {f"{kind} of": messages.get((image.image_id, kind)) for kind in ("review", "outcome")}
        await clinic.harm(name, harm)
        for table, what in found.items():
            if table in rows:
                expected[table, str(rows[table])] = what
            elif table in told:
                expected["outbox", str(told[table])] = what
            else:
                expected["assessments", f"of image {image.image_id}: who confirmed it"] = what
    assert await clinic.found() == expected


async def test_whatever_decides_access_erasure_or_the_model_is_named(clinic) -> None:
    for harm in OTHERS:
        await clinic.tamperer.execute(harm)
    found = await clinic.found()
    assert sorted((table, what) for (table, _), what in found.items()) == sorted(OTHERS.values())


async def test_rows_from_before_digests_are_counted_and_still_none_comes_or_goes(clinic) -> None:
    whole = await reconcile(clinic.app)
    await clinic.tamperer.execute(
        "UPDATE audit_events SET detail = detail - 'rows' - 'message_id'"
        " WHERE action NOT IN ('review', 'record_outcome', 'link', 'unlink')"  # which always had them
    )
    older = await reconcile(clinic.app)
    assert (older.compared, older.differences) == (whole.compared, ())
    assert older.without_digest > len(IMAGES)
    # What is changed from now on has a digest, and the rest goes on without.
    event = account_event("end_assignment", {"subject": "dr"}, patient_id="p-open")
    assert await AccessStore(clinic.owner).end_assignment("p-open", "dr", event=event) == 1
    await HoldStore(clinic.owner).release(clinic.ids["kept"], actor="op")
    # A replica that is not updated yet changes what has one.
    await clinic.tamperer.execute("UPDATE legal_holds SET released_by = 'other' WHERE patient_id = 'p-held'")
    event = account_event("hold_release", {"hold_id": str(clinic.ids["kept"])})
    await LesionStore(clinic.app).record_event(event)
    await clinic.tamperer.execute("DELETE FROM care_assignments WHERE patient_id = 'p-open'")
    event = account_event("end_assignment", {"subject": "dr"}, patient_id="p-open")
    await LesionStore(clinic.app).record_event(event)
    newer = await reconcile(clinic.app)
    assert (newer.without_digest, newer.differences) == (older.without_digest - 1, ())
    gone = clinic.images["gone"]
    for statement in (
        "DELETE FROM legal_holds WHERE patient_id = 'p-free'",
        "DELETE FROM revocations",
        "INSERT INTO care_assignments VALUES ('p-open', 'dr-x', '2020-01-01')",
        "UPDATE lesion_images SET erased_at = now(), sealed = NULL WHERE patient_id = 'of hidden'",
        "UPDATE lesions SET patient_id = 'x' WHERE patient_id = 'of moved'",
    ):
        await clinic.tamperer.execute(statement)
    await clinic.harm("gone", IMAGES["gone"][0])
    assert await clinic.found() == {
        ("legal_holds", str(clinic.ids["freed"])): GONE,
        ("revocations", "subject out"): GONE,
        ("care_assignments", '["dr-x", "p-open", "2020-01-01T00:00:00.000000+00:00"]'): UNKNOWN,
        ("lesion_images", str(clinic.images["hidden"].image_id)): "is erased, and no event says so",
        ("lesion_images", str(clinic.images["moved"].image_id)): DIFFERS,
        ("lesion_images", str(gone.image_id)): GONE,
        ("assessments", str(gone.assessment_id)): GONE,
    }


async def test_an_event_of_no_form_of_ours_is_named_and_holds_up_nothing(clinic) -> None:
    records = LesionStore(clinic.app)
    for detail in ({"rows": 5}, {"rows": {"lesion_images": ["x"]}}, {}, {"receipt_id": 1}):
        for action in ("erased", "hold_set"):
            about = {"action": action, "actor": "x", "request_id": "r", "image_id": uuid4()}
            await records.record_event(AuditEvent(**about, outcome="success", detail=detail))
    found = await clinic.found()
    assert [(table, name.split()[1]) for table, name in found] == [
        *(("audit_events", "(erased)"), ("audit_events", "(hold_set)"))
    ] * 4


async def test_no_digest_tells_what_its_event_does_not_say(clinic) -> None:
    """Reasons, birth dates and contexts are easily guessed: with each goes something that cannot be."""
    for table in ("emergency_accesses", "legal_holds", "patient_records", "reviews", "lesion_outcomes"):
        row = await clinic.tamperer.fetchrow(f"SELECT * FROM {table}")
        assert isinstance(row["salt"], UUID)
        await clinic.tamperer.execute(f"UPDATE {table} SET salt = gen_random_uuid()")
        found = await clinic.found()
        assert {name for name, _ in found} >= {table}
    context = "SELECT context FROM assessments AS a JOIN lesion_images AS i USING (image_id) WHERE i.patient_id = $1"
    assert await clinic.tamperer.fetchval(context, "of erased") == "{}"


_NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(st.characters(exclude_characters="\0", codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcé\u2028", max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


async def test_a_digest_is_that_of_what_a_jsonb_gives_back(pool) -> None:
    """-0.0, 1e16 and 5e-324 come back in another form."""
    texts: list[str] = []

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(_JSON)
    def collect(value: object) -> None:
        texts.append(json.dumps(value))

    collect()
    texts += ["-0.0", "1e16", "1e22", "5e-324", "1.7976931348623157e308", '{"b": 1, "a": 1.0}']
    rows = await pool.fetch("SELECT text, text::jsonb::text AS stored FROM unnest($1::text[]) AS text", texts)
    assert all(json_digest(row["text"]) == json_digest(row["stored"]) for row in rows)
    assert json_digest("[1]") == json_digest("[1.0]") != json_digest("[1.5]")
