-- name: events
-- What was done to rows, in order: every event that holds digests ($2 in its detail), and those of these actions ($1).
SELECT event_id, action, actor, outcome, patient_id, lesion_id, image_id, assessment_id, detail
FROM audit_events
WHERE outcome <> 'denied' AND (action = ANY($1::text[]) OR detail ? $2)
ORDER BY event_id;

-- name: images
-- Every lesion, image and assessment, each with the others where they are; the answer as text, for its digest.
SELECT
    l.lesion_id AS of_lesion, i.image_id AS of_image, a.assessment_id AS of_assessment,
    i.image_id, a.assessment_id, l.lesion_id, CASE WHEN l.patient_id = i.patient_id THEN l.patient_id END AS patient_id,
    i.encounter_id, i.created_at, i.content_type, i.width, i.height, i.data_key_id,
    substring(i.sealed FROM octet_length(i.sealed) - $1::integer + 1) AS tag, i.erased_at,
    a.context, a.top_k, a.licences, a.confirmed_only, a.actor, a.request_id,
    a.outcome, a.answer::text AS answer, a.failure, a.demand_level::text, a.demand_urgency::text, a.demand_answered_at,
    a.confirmed_by, v.vectors, v.embedding_space, v.embedding
FROM lesions AS l
FULL JOIN lesion_images AS i ON i.lesion_id = l.lesion_id
FULL JOIN assessments AS a ON a.image_id = i.image_id
LEFT JOIN LATERAL (
    SELECT
        count(*) AS vectors, (array_agg(e.embedding_space))[1] AS embedding_space,
        (array_agg(e.embedding))[1] AS embedding
    FROM lesion_embeddings AS e
    WHERE e.image_id = i.image_id
) AS v ON true;

-- name: erasures
-- Every erasure and receipt, each with the other where it is.
SELECT
    coalesce(e.receipt_id, r.receipt_id) AS receipt_id, e.image_id, e.data_key_id, e.ciphertext_sha256, e.reason, e.actor,
    r.erased_at, r.record_hash
FROM erasures AS e
FULL JOIN erasure_receipts AS r USING (receipt_id);

-- name: messages
-- Every message to the PMS, and the encounter of its image.
SELECT o.message_id, o.kind, o.assessment_id, o.encounter_id, o.delivered_at IS NOT NULL AS delivered, i.image_id,
    i.encounter_id AS of_image
FROM outbox AS o
LEFT JOIN assessments AS a USING (assessment_id)
LEFT JOIN lesion_images AS i USING (image_id);

-- name: serving
-- Which model answers.
SELECT model_id, model_digest, embedding_space FROM serving;

-- name: publications
-- Every publication.
SELECT
    publication_id, action, model_id, model_digest, embedding_space, approved_by, reason, report_sha256, takes_back
FROM publications;

-- name: care_assignments
-- Who cares for whom.
SELECT * FROM care_assignments;

-- name: revocations
-- Who is locked out.
SELECT * FROM revocations;

-- name: emergency_accesses
-- Who went in without an assignment.
SELECT * FROM emergency_accesses;

-- name: legal_holds
-- What must not be erased.
SELECT * FROM legal_holds;

-- name: site_operating_points
-- Which thresholds a site has set.
SELECT * FROM site_operating_points;

-- name: reviews
-- What clinicians said of assessments; without the note, which goes with the image.
SELECT * FROM reviews;

-- name: review_notes
-- The notes of what clinicians said, and where there is none any more because the image was erased.
SELECT r.review_id, r.note, r.note_salt, i.image_id
FROM reviews AS r
INNER JOIN assessments AS a USING (assessment_id)
INNER JOIN lesion_images AS i USING (image_id)
WHERE r.note IS NOT NULL OR i.erased_at IS NOT NULL;

-- name: lesion_outcomes
-- What lesions turned out to be.
SELECT * FROM lesion_outcomes;

-- name: lesion_links
-- Which lesions clinicians said are one.
SELECT * FROM lesion_links;

-- name: closed_records
-- Whose retention runs.
SELECT * FROM closed_records;

-- name: hook_identities
-- Whom an EHR means by its ids.
SELECT * FROM hook_identities;

-- name: hook_feedback
-- What became of cards in an EHR; without the comment, which goes with the image.
SELECT * FROM hook_feedback;
