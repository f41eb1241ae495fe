"""Each invariant holds on what is loaded rightly, and names what breaks it."""

from __future__ import annotations

import pytest

from serve_app.records.health import INVARIANTS, find_violations
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceCache, ReferenceImage, ReferenceStore, SpaceEmbedder
from serve_app.records.serving import LiveModel, publish

#: An erased image of a patient, of which nothing is left.
ERASED = """
WITH l AS (
    INSERT INTO lesions VALUES (gen_random_uuid(), 'p', now()) RETURNING lesion_id
)
INSERT INTO lesion_images (
    image_id, lesion_id, patient_id, created_at, content_type, width, height, data_key_id, erased_at
)
SELECT gen_random_uuid(), l.lesion_id, 'p', now(), 'image/jpeg', 300, 300, gen_random_uuid(), now() FROM l;
"""
LEFT_VECTOR = """
INSERT INTO lesion_embeddings
SELECT i.image_id, r.embedding_space, r.embedding FROM lesion_images AS i, reference_embeddings AS r;
"""
UNPROVEN = """
INSERT INTO erasures
SELECT gen_random_uuid(), i.image_id, i.data_key_id, sha256('x'),
    'patient_request', NULL, 'dr', 'r', now() - interval '11 minutes'
FROM lesion_images AS i;
"""

#: What is left of an erased image, whose demand is still on record.
ASSESSED = """
INSERT INTO assessments (
    assessment_id, image_id, created_at, outcome, completed_at, context, top_k, licences, actor, request_id,
    demand_level, demand_urgency
)
SELECT i.image_id, i.image_id, now(), 'erased', now(), '{}', 1, '{}', 'dr', 'r', 'high', 'urgent' FROM lesion_images AS i;
"""
LEFT_NOTE = """
INSERT INTO reviews (review_id, assessment_id, clinician, request_id, decision, note, note_salt)
SELECT a.image_id, a.image_id, 'dr', 'r', 'accept', 'her left arm', a.image_id FROM assessments AS a;
"""
LEFT_COMMENT = """
INSERT INTO hook_cards (card_id, client, kind, assessment_id)
SELECT a.image_id, 'west', 'open_demand', a.image_id FROM assessments AS a;
INSERT INTO hook_feedback (feedback_id, card_id, outcome, comment, outcome_at)
SELECT a.image_id, a.image_id, 'overridden', 'her left arm', now() FROM assessments AS a;
"""
LEFT_FACTS = """
INSERT INTO assessment_facts (assessment_id, created_on, completed_on, outcome, is_index, age_band)
SELECT a.image_id, now(), now(), 'erased', true, '80+' FROM assessments AS a;
"""
#: Of three lesions: the third to the second, and that to the first; of two, the first to the second.
CHAINED = """
INSERT INTO lesions SELECT gen_random_uuid(), 'p', now() + n * interval '1 s' FROM generate_series(1, 3) AS n;
INSERT INTO lesion_links (link_id, lesion_id, earlier_lesion_id, patient_id, reason, linked_by, request_id)
SELECT gen_random_uuid(), lesion_id, earlier, 'p', 'other', 'dr', 'r'
FROM (SELECT lesion_id, lag(lesion_id) OVER (ORDER BY created_at) AS earlier FROM lesions) AS l
WHERE earlier IS NOT NULL;
"""
BACKWARDS = CHAINED.replace("lag", "lead").replace("series(1, 3)", "series(1, 2)")
ANSWERED = "UPDATE assessments SET demand_answered_at = now();"

#: As in a database that was filled before licences were checked there.
UNLICENSED = """
ALTER TABLE reference_images DROP CONSTRAINT reference_images_licensed;
UPDATE reference_images SET copyright_license = 'all rights reserved';
"""

IMAGE = ReferenceImage("ISIC_0000001", None, "NV", None, None, None, None, "CC-0", "Anonymous")


@pytest.fixture(scope="module")
async def pools(new_database, unit_vectors):
    """An owner's pool on a database with one live reference, and the application's."""
    urls = await new_database()
    owner, application = [
        await open_pool(url, minimum=0, maximum=1, timeout_s=20) for url in (urls.owner, urls.app)
    ]
    await ReferenceStore(owner).load([IMAGE], unit_vectors(1), embedding_space="s")
    await ReferenceCache(owner).reassign(SpaceEmbedder("s", "lite0.a", "a" * 64, "1"), expected=1)
    await publish(owner, LiveModel("lite0.a", "digest", "s"))
    yield owner, application
    await owner.close()
    await application.close()


async def found_after(owner, harm: str):
    """What is found while the harm is done; it is undone."""
    async with owner.connection() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute(harm)
            return await find_violations(connection)
        finally:
            await transaction.rollback()


async def test_nothing_is_violated_where_everything_is_as_it_should_be(pools) -> None:
    """An image that was erased rightly violates nothing either."""
    owner, application = pools
    assert await find_violations(application) == []
    assert await found_after(owner, ERASED) == []


@pytest.mark.parametrize(
    ("harm", "violated"),
    [
        (UNLICENSED, "references_licensed"),
        ("UPDATE reference_embeddings SET copyright_license = 'CC-BY'", "references_licensed"),
        ("UPDATE reference_images SET attribution = ' '", "references_licensed"),
        ("UPDATE reference_embeddings SET embedding = embedding + embedding", "live_vectors_of_unit_norm"),
        ("DELETE FROM reference_embeddings", "live_space_holds_references"),
        ("UPDATE space_embedders SET model_id = 'another.model'", "live_space_of_the_live_model"),
        (
            "INSERT INTO reference_images VALUES (gen_random_uuid(), NULL, 'NV', NULL, NULL, NULL, NULL, 'CC-0', 'A')",
            "references_of_the_archive",
        ),
        (ERASED + LEFT_VECTOR, "erased_images_leave_nothing"),
        *(
            (ERASED + ASSESSED + left, "erased_images_leave_nothing")
            for left in (LEFT_NOTE, LEFT_COMMENT, LEFT_FACTS)
        ),
        (ERASED + UNPROVEN, "erasures_proven"),
        (ERASED + ASSESSED + ANSWERED, "demands_answered_by_decisions"),
        (CHAINED, "links_to_a_first"),
        (BACKWARDS, "links_to_a_first"),
    ],
)
async def test_each_violation_is_named_and_counted(pools, harm: str, violated: str) -> None:
    (found,) = await found_after(pools[0], harm)
    assert (found.name, found.count) == (violated, 1)
    assert found.invariant == INVARIANTS[violated] != ""
