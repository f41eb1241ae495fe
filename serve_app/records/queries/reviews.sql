-- name: claim_key
-- Take an Idempotency-Key for what is about to be recorded; no row where it is taken. Whoever comes second waits here.
INSERT INTO idempotency_keys (actor, key, request_sha256, lesion_id, created_id, created_at)
VALUES ($1, $2, $3, $4, $5, now())
ON CONFLICT (actor, key) DO NOTHING
RETURNING true;

-- name: find_key
-- What was sent under an Idempotency-Key, and which review or outcome that led to.
SELECT request_sha256, created_id FROM idempotency_keys WHERE actor = $1 AND key = $2;

-- name: given
-- Whether the clinician $1 may have been given the answer $2 already, by this service or by a PMS that was told of it.
-- Whatever they did with the patient since counts, unless it is listed here as showing nothing of an answer: an action
-- that comes later counts until somebody says so. An upload shows the answer, and what the lesion demands, where it was
-- answered while they waited (201): then nobody had to claim its assessment. Lesions that are linked, or were, are shown as one.
WITH answer AS (
    SELECT a.assessment_id, a.completed_at, i.patient_id, same_lesions(i.lesion_id, true) AS same
    FROM assessments AS a
    INNER JOIN lesion_images AS i USING (image_id)
    WHERE a.assessment_id = $2
)
SELECT EXISTS (
    SELECT FROM answer AS x
    INNER JOIN lesion_images AS i ON i.lesion_id = ANY(x.same)
    INNER JOIN assessments AS a USING (image_id)
    WHERE a.actor = $1 AND a.attempts = 0 AND a.completed_at >= x.completed_at
) OR EXISTS (
    SELECT FROM outbox AS o WHERE o.assessment_id = $2 AND o.sent_at IS NOT NULL
) OR EXISTS (
    SELECT FROM answer AS x
    INNER JOIN audit_events AS e ON e.actor = $1 AND e.recorded_at >= x.completed_at
    WHERE e.outcome = 'success'
        AND e.action <> ALL('{upload,classify,download,confirm,record_outcome,erase,erased,read_receipt,break_glass}')
        AND CASE e.action
            WHEN 'view_worklist' THEN e.detail #> ARRAY['shown', x.patient_id] ?| x.same::text[]
            ELSE coalesce(e.lesion_id = ANY(x.same), e.patient_id = x.patient_id)
        END
);

-- name: record
-- Record what a clinician says, and answer the demands that it answers.
SELECT record_review($1, jsonb_populate_record(NULL::reviews, $2));

-- name: recorded
-- The row of a review, for its digest, and its image.
SELECT r.*, a.image_id
FROM reviews AS r
INNER JOIN assessments AS a USING (assessment_id)
WHERE r.review_id = $1;

-- name: answered
-- Assessments as they are, for their digests.
SELECT
    a.assessment_id, a.outcome, a.answer::text AS answer, a.failure, a.demand_level::text, a.demand_urgency::text,
    a.demand_answered_at, e.embedding_space, e.embedding
FROM assessments AS a
LEFT JOIN lesion_embeddings AS e USING (image_id)
WHERE a.assessment_id = ANY($1::uuid[]);

-- name: review
-- One review, with whose it is.
SELECT i.lesion_id, i.patient_id, to_jsonb(v) AS said
FROM (:recorded_review) AS v
INNER JOIN lesion_images AS i USING (image_id)
WHERE v.review_id = $1;

-- name: named_image
-- How an image of a lesion is.
SELECT erased_at IS NOT NULL AS erased FROM lesion_images WHERE lesion_id = $1 AND image_id = $2;

-- name: record_outcome
-- Record what a lesion turned out to be.
INSERT INTO lesion_outcomes
    (outcome_id, lesion_id, image_id, kind, diagnosis, malignant, code, code_system, observed_on, source, recorded_by,
     request_id)
SELECT
    n.outcome_id, n.lesion_id, n.image_id, n.kind, n.diagnosis, n.malignant, n.code, n.code_system, n.observed_on, n.source,
    n.recorded_by, n.request_id
FROM jsonb_populate_record(NULL::lesion_outcomes, $1) AS n
RETURNING *;

-- name: outcome
-- One outcome, with whose it is.
SELECT o.lesion_id, l.patient_id, to_jsonb(v) AS said
FROM (:recorded_outcome) AS v
INNER JOIN lesion_outcomes AS o USING (outcome_id)
INNER JOIN lesions AS l ON l.lesion_id = o.lesion_id
WHERE v.outcome_id = $1;

-- name: link
-- Link a lesion to an earlier one.
SELECT link_lesion(jsonb_populate_record(NULL::lesion_links, $1));

-- name: link_in_force
-- The link of a lesion to an earlier one.
SELECT link_id FROM lesion_links WHERE lesion_id = $1 AND ended_at IS NULL;

-- name: unlink
-- End a link; true where this did.
SELECT unlink_lesion($1, $2, $3, $4);

-- name: link_row
-- The row of a link, for its digest.
SELECT * FROM lesion_links WHERE link_id = $1;

-- name: find_link
-- One link, as it is shown.
SELECT * FROM (:recorded_link) AS v WHERE link_id = $1;

-- name: tell_again
-- Have the PMS told of lesions that are linked now, or were until now ($1: one of them): of each its report, in every
-- encounter that may have had one.
INSERT INTO outbox (message_id, kind, assessment_id, encounter_id)
SELECT DISTINCT ON (i.lesion_id, i.encounter_id) gen_random_uuid(), 'fhir', a.assessment_id, i.encounter_id
FROM lesion_images AS i
INNER JOIN assessments AS a USING (image_id)
WHERE i.lesion_id = ANY(same_lesions($1, true)) AND i.encounter_id IS NOT NULL AND a.outcome <> 'pending' AND EXISTS (
    SELECT FROM outbox AS o
    INNER JOIN assessments AS told USING (assessment_id)
    INNER JOIN lesion_images AS of ON of.image_id = told.image_id
    WHERE o.kind = 'fhir' AND o.encounter_id = i.encounter_id AND of.lesion_id = i.lesion_id
        AND (o.sent_at IS NOT NULL OR o.lease_until IS NOT NULL)
)
ORDER BY i.lesion_id, i.encounter_id, i.created_at DESC;

-- name: queue
-- Have the PMS told of a review ($2 'review') or an outcome ($3), in the encounter of the image $4, or where none is named
-- of the lesion's ($5) newest that is there and has one; with $6, of the lesion's report after it. Says of which image.
-- Of an erased image only what it demanded is decided on, and that the PMS must know to be closed.
WITH image AS (
    SELECT i.image_id, a.assessment_id, i.encounter_id
    FROM lesion_images AS i
    INNER JOIN assessments AS a USING (image_id)
    WHERE i.lesion_id = $5 AND i.image_id = coalesce($4, i.image_id)
        AND i.encounter_id IS NOT NULL AND (i.erased_at IS NULL OR $4 IS NOT NULL) AND a.outcome <> 'pending'
    ORDER BY i.created_at DESC, i.image_id DESC
    LIMIT 1
),
queued AS (
    INSERT INTO outbox (message_id, assessment_id, encounter_id, kind, subject_id)
    SELECT m.message_id, i.assessment_id, i.encounter_id, m.kind, m.subject_id
    FROM image AS i
    CROSS JOIN (
        VALUES (1, $1::uuid, $2::text, $3::uuid), (2, CASE WHEN $6::boolean THEN gen_random_uuid() END, 'fhir', NULL)
    ) AS m (place, message_id, kind, subject_id)
    WHERE m.message_id IS NOT NULL
    ORDER BY m.place
)
SELECT image_id FROM image;
