-- name: access
-- Say whether the principal cares for the patient now, by assignment or in an emergency, and whose the lesion is.
-- Without a patient, the lesion's own is meant.
SELECT
    l.patient_id AS lesion_patient,
    EXISTS (
        SELECT FROM care_assignments AS c
        WHERE c.clinician = $1
            AND c.patient_id = coalesce($2, l.patient_id)
            AND c.starts_at <= now()
            AND (c.ends_at IS NULL OR c.ends_at > now())
    ) AS assigned,
    (
        SELECT e.emergency_id
        FROM emergency_accesses AS e
        WHERE e.principal = $1
            AND e.patient_id = coalesce($2, l.patient_id)
            AND e.starts_at <= now()
            AND e.ends_at > now()
            AND e.ended_at IS NULL
        ORDER BY e.ends_at DESC
        LIMIT 1
    ) AS emergency
FROM (VALUES ($3::uuid)) AS asked (lesion_id)
LEFT JOIN lesions AS l USING (lesion_id);

-- name: find_replay
-- Find what an Idempotency-Key led to: an assessment, or what else was sent under it.
SELECT request_sha256, lesion_id, coalesce(assessment_id, created_id) AS assessment_id
FROM idempotency_keys
WHERE actor = $1 AND key = $2;

-- name: admit
-- T1: the sealed image, its pending assessment, the clinician's impression and the audit event, all or nothing; a key that
-- is taken admits nothing. Concurrent holders of one key wait here for the first one's commit. The lease of
-- whoever admits it runs by this server's clock, and from the writing on: not from before such a wait.
WITH claimed AS (
    INSERT INTO idempotency_keys
        (actor, key, request_sha256, lesion_id, image_id, assessment_id, created_at)
    SELECT :actor, :idempotency_key, :request_sha256, :lesion_id, :image_id, :assessment_id, :created_at
    WHERE :idempotency_key::text IS NOT NULL
    ON CONFLICT (actor, key) DO NOTHING
    RETURNING assessment_id
),
admitted AS (
    SELECT FROM claimed
    UNION ALL
    SELECT WHERE :idempotency_key::text IS NULL
),
lesion AS (
    INSERT INTO lesions (lesion_id, patient_id, created_at)
    SELECT :lesion_id, :patient_id, :created_at FROM admitted
    WHERE :new_lesion::boolean
),
image AS (
    INSERT INTO lesion_images
        (image_id, lesion_id, patient_id, encounter_id, created_at, content_type, width, height,
         data_key_id, sealed)
    SELECT
        :image_id, :lesion_id, :patient_id, :encounter_id, :created_at, :content_type, :width, :height,
        :data_key_id, :sealed
    FROM admitted
),
assessment AS (
    INSERT INTO assessments
        (assessment_id, image_id, created_at, outcome, context, top_k, licences, actor, request_id, confirmed_only,
         lease_until)
    SELECT
        :assessment_id, :image_id, :created_at, 'pending', :context, :top_k, :licences, :actor, :request_id,
        :confirmed_only, clock_timestamp() + :lease::interval
    FROM admitted
),
impression AS (
    INSERT INTO reviews
        (review_id, assessment_id, clinician, request_id, recorded_at, impression_diagnosis, intended_referral,
         before_answer, salt)
    SELECT
        :review_id, :assessment_id, :actor, :request_id, :created_at, :impression_diagnosis, :intended_referral,
        :before_answer, :salt
    FROM admitted
    WHERE :review_id::uuid IS NOT NULL
),
event AS (:record_event FROM admitted)
SELECT EXISTS (SELECT FROM admitted);

-- name: finish
-- T2: the answer and the embedding, or the code of what keeps it from one; the audit event and the messages for the
-- PMS (if one is asked for; with :fhir, the lesion's report after it), once: when the assessment is still pending.
WITH finished AS (
    UPDATE assessments
    SET outcome = :outcome, answer = :answer::text::jsonb, failure = :failure, completed_at = now(), lease_until = NULL,
        demand_level = :demand_level::text::risk_level, demand_urgency = :demand_urgency::text::urgency
    WHERE assessment_id = :assessment_id AND outcome = 'pending'
    RETURNING image_id
),
embedded AS (
    INSERT INTO lesion_embeddings (image_id, embedding_space, embedding)
    SELECT image_id, :embedding_space, :embedding FROM finished
    WHERE :embedding::halfvec IS NOT NULL
),
event AS (:record_event FROM finished),
queued AS (
    INSERT INTO outbox (message_id, kind, assessment_id, encounter_id)
    SELECT m.message_id, m.kind, :assessment_id, i.encounter_id
    FROM finished
    INNER JOIN lesion_images AS i USING (image_id)
    CROSS JOIN (
        VALUES (1, :message_id::uuid, 'assessment'), (2, CASE WHEN :fhir::boolean THEN gen_random_uuid() END, 'fhir')
    ) AS m (place, message_id, kind)
    WHERE m.message_id IS NOT NULL AND i.encounter_id IS NOT NULL
    ORDER BY m.place
)
SELECT EXISTS (SELECT FROM finished);

-- name: claim_pending
-- Lease pending assessments that nobody has a lease on, oldest first; claimers pass each other by.
-- Each try that does not finish one doubles its lease, up to five minutes.
WITH claimable AS (
    SELECT assessment_id
    FROM assessments
    WHERE outcome = 'pending'
        AND (lease_until IS NULL OR lease_until < now())
    ORDER BY created_at
    LIMIT $2
    FOR UPDATE SKIP LOCKED
),
claimed AS (
    UPDATE assessments AS a
    SET lease_until = now() + greatest($1::interval, least($1::interval * 2 ^ least(a.attempts, 16), interval '5 minutes')),
        attempts = least(a.attempts, 32766) + 1
    FROM claimable AS c
    WHERE a.assessment_id = c.assessment_id
    RETURNING a.*
)
SELECT
    c.assessment_id, c.created_at, c.context, c.top_k, jsonb_build_object('licences', c.licences, 'confirmed_only', c.confirmed_only) AS reference_filter,
    c.actor, c.request_id, c.attempts,
    i.lesion_id, i.image_id, i.patient_id, i.encounter_id, i.content_type, i.width, i.height, i.sealed
FROM claimed AS c
INNER JOIN lesion_images AS i USING (image_id)
ORDER BY c.created_at;

-- name: set_back
-- Note that a try failed; it counts when another image was answered since the try before. Says how many have counted.
UPDATE assessments AS a
SET set_back_at = now(),
    setbacks = a.setbacks + (EXISTS (
        SELECT FROM assessments AS o WHERE o.answer IS NOT NULL AND o.completed_at > a.set_back_at
    ))::integer
WHERE a.assessment_id = $1 AND a.outcome = 'pending'
RETURNING a.setbacks;

-- name: counts
-- Count what is pending and what has failed, and say how long the oldest has been pending.
SELECT
    (SELECT count(*) FROM assessments WHERE outcome = 'pending') AS pending,
    (SELECT count(*) FROM assessments WHERE outcome = 'failed') AS failed,
    (
        SELECT extract(epoch FROM now() - min(created_at))::float8
        FROM assessments
        WHERE outcome = 'pending'
    ) AS oldest_pending_s;

-- name: classified_image
-- Every image whose assessment holds a classification, with its embedding in the space $1; `questioned`: whether it counts as
-- its lesion's own only once it is confirmed. For other statements to choose from.
SELECT
    i.lesion_id, i.patient_id, i.image_id, i.created_at, a.answer #> '{classification,probabilities}' AS probabilities,
    e.embedding, a.demand_level::text AS level, a.context,
    a.answer -> 'reasons' @> '[{"code": "perhaps_another_lesion"}]' AND a.confirmed_at IS NULL AS questioned
FROM lesion_images AS i
INNER JOIN assessments AS a USING (image_id)
LEFT JOIN lesion_embeddings AS e ON e.image_id = i.image_id AND e.embedding_space = $1
WHERE a.answer #> '{classification,probabilities}' IS NOT NULL;

-- name: previous
-- Find the newest image before a time of a lesion, or of one that is linked with it, that was classified and is its own.
SELECT c.image_id, c.created_at, c.probabilities, c.embedding, c.level
FROM (:classified_image) AS c
WHERE c.lesion_id = ANY(same_lesions($2)) AND c.created_at < $3 AND NOT c.questioned
ORDER BY c.created_at DESC, c.image_id DESC
LIMIT 1;

-- name: compared
-- Find the image $3 of the lesion's patient, with which a later one was compared: linked then, it may not be any more.
SELECT c.image_id, c.created_at, c.probabilities, c.embedding, c.level
FROM (:classified_image) AS c
INNER JOIN lesions AS l ON l.patient_id = c.patient_id
WHERE l.lesion_id = $2 AND c.image_id = $3;

-- name: likeliest
-- Of lesions that came before the lesion $2, of its patient and with an image of the same site: the one whose image looks
-- most like its own, and is nearest where both say where they are in one view; what is not known counts as $3. Named by its
-- first, which a link is to. None for a lesion of several images, for one that is linked, and of those that once were.
WITH own AS (
    SELECT c.*, h.created_at AS begun
    FROM (:classified_image) AS c
    INNER JOIN lesion_heads AS h USING (lesion_id)
    WHERE c.lesion_id = $2 AND cardinality(same_lesions($2)) = 1
        AND (SELECT count(*) FROM lesion_images AS i WHERE i.lesion_id = $2) = 1
),
others AS (
    SELECT
        h.head AS lesion_id, c.image_id, c.created_at, 1 - (c.embedding <=> o.embedding) AS similarity,
        CASE WHEN c.context #>> '{position,view}' = o.context #>> '{position,view}' THEN
            sqrt(
                power((c.context #>> '{position,x}')::float8 - (o.context #>> '{position,x}')::float8, 2)
                + power((c.context #>> '{position,y}')::float8 - (o.context #>> '{position,y}')::float8, 2)
            )
        END AS distance
    FROM own AS o
    INNER JOIN lesion_heads AS h ON h.patient_id = o.patient_id AND (h.created_at, h.lesion_id) < (o.begun, o.lesion_id)
    INNER JOIN (:classified_image) AS c ON c.lesion_id = h.lesion_id AND NOT c.questioned
    WHERE c.context ->> 'anatom_site_general' = o.context ->> 'anatom_site_general'
        AND NOT h.head = ANY(same_lesions($2, true))
)
SELECT lesion_id, image_id, created_at, similarity, distance
FROM others
WHERE similarity IS NOT NULL
ORDER BY similarity - coalesce(distance, $3::float8) DESC, created_at DESC, image_id DESC
LIMIT 1;

-- name: recorded_image
-- Tell of images, each with its lesion and what was made of it: all, for other statements to choose from.
SELECT
    l.lesion_id, l.patient_id, l.created_at AS lesion_created_at,
    i.image_id, i.encounter_id, i.created_at, i.content_type, i.width, i.height,
    a.assessment_id, a.answer AS assessment, a.outcome, a.failure, a.completed_at,
    a.context ->> 'anatom_site_general' AS anatom_site_general, a.context -> 'position' AS position,
    CASE WHEN e.receipt_id IS NOT NULL THEN
        jsonb_build_object('receipt_id', e.receipt_id, 'erased_at', i.erased_at, 'reason', e.reason)
    END AS erasure,
    CASE WHEN a.confirmed_by IS NOT NULL THEN
        jsonb_build_object('confirmed_by', a.confirmed_by, 'confirmed_at', a.confirmed_at)
    END AS identity,
    CASE
        WHEN o.dead_at IS NOT NULL THEN o.last_error
        WHEN o.delivered_at IS NULL AND o.sent_at IS NULL AND o.attempts > 0 THEN 'encounter_not_confirmed'
        WHEN EXISTS (
            SELECT FROM outbox AS said
            WHERE said.assessment_id = a.assessment_id AND said.kind IN ('review', 'outcome') AND said.dead_at IS NOT NULL
        ) THEN 'said_not_delivered'
    END AS undelivered
FROM lesions AS l
INNER JOIN lesion_images AS i USING (lesion_id)
INNER JOIN assessments AS a USING (image_id)
LEFT JOIN erasures AS e USING (image_id)
LEFT JOIN outbox AS o ON o.assessment_id = a.assessment_id AND o.kind = 'assessment';

-- name: recorded_review
-- Tell of reviews, as they are shown: all, for other statements to choose from.
SELECT
    r.review_id, r.assessment_id, a.image_id, r.clinician, r.recorded_at, r.decision, r.reason, r.diagnosis, r.level,
    r.urgency, r.referral_made, r.follow_up_by, r.note, r.answers,
    CASE WHEN r.before_answer IS NOT NULL THEN
        jsonb_build_object(
            'diagnosis', r.impression_diagnosis, 'intended_referral', r.intended_referral, 'recorded_at', r.recorded_at,
            'before_answer', r.before_answer
        )
    END AS impression
FROM reviews AS r
INNER JOIN assessments AS a USING (assessment_id);

-- name: recorded_outcome
-- Tell of outcomes, as they are shown: all, for other statements to choose from.
SELECT
    outcome_id, kind, diagnosis, malignant, code, code_system, observed_on, source, image_id, recorded_by, recorded_at
FROM lesion_outcomes;

-- name: recorded_link
-- Tell of links, as they are shown: all, for other statements to choose from.
SELECT link_id, lesion_id, earlier_lesion_id, reason, linked_by, linked_at, ended_by, ended_at, end_reason
FROM lesion_links;

-- name: follow_ups
-- Which follow-up each lesion of a statement's `images` waits for, due or not; those that are linked (`head`) are one. Of each
-- assessment the day that was named last counts, whatever was decided since without one; done when another image of the
-- lesion (`newest`: of those that are not erased), or its outcome, has come since.
SELECT DISTINCT ON (i.head)
    i.lesion_id, i.assessment_id, r.review_id, r.level, r.urgency, r.recorded_at, r.follow_up_by
FROM images AS i
CROSS JOIN LATERAL (
    SELECT * FROM reviews
    WHERE assessment_id = i.assessment_id AND follow_up_by IS NOT NULL
    ORDER BY recorded_at DESC, review_id DESC
    LIMIT 1
) AS r
WHERE (i.newest IS NULL OR i.newest <= r.recorded_at)
    AND NOT EXISTS (
        SELECT FROM lesion_outcomes AS o
        WHERE o.lesion_id = ANY(same_lesions(i.lesion_id))
            AND o.recorded_at > r.recorded_at
            AND o.observed_on >= (r.recorded_at AT TIME ZONE 'UTC')::date
    )
ORDER BY i.head, r.follow_up_by, r.recorded_at;

-- name: timeline
-- List the images of a lesion and of those that are linked with it, newest first, each with what was said of it in the order
-- in which it was; likewise the outcomes, and every link of theirs.
SELECT
    r.*, l.lesion_id AS of_lesion, l.created_at AS begun, (SELECT open_demand($1)) AS open_demand,
    (
        SELECT coalesce(jsonb_agg(to_jsonb(v) ORDER BY v.recorded_at, v.review_id), '[]')
        FROM (:recorded_review) AS v
        WHERE v.assessment_id = r.assessment_id
    ) AS reviews,
    (
        SELECT coalesce(jsonb_agg(to_jsonb(v) ORDER BY v.recorded_at, v.outcome_id), '[]')
        FROM (:recorded_outcome) AS v
        WHERE v.outcome_id IN (SELECT o.outcome_id FROM lesion_outcomes AS o WHERE o.lesion_id = ANY(same_lesions($1)))
    ) AS outcomes,
    (
        SELECT coalesce(jsonb_agg(to_jsonb(v) ORDER BY v.linked_at, v.link_id), '[]')
        FROM (:recorded_link) AS v
        WHERE v.lesion_id = ANY(same_lesions($1)) OR v.earlier_lesion_id = ANY(same_lesions($1))
    ) AS links
FROM lesions AS l
INNER JOIN (:recorded_image) AS r ON r.lesion_id = ANY(same_lesions($1))
WHERE l.lesion_id = $1
ORDER BY r.created_at DESC, r.image_id DESC;

-- name: patient_lesions
-- List a patient's lesions, newest first, each with its newest image, from behind a cursor on.
SELECT
    r.*, r.lesion_id AS of_lesion, r.lesion_created_at AS begun, nullif(l.head, l.lesion_id) AS linked_to,
    open_demand(r.lesion_id) AS open_demand
FROM (
    SELECT lesion_id, head
    FROM lesion_heads
    WHERE patient_id = $1
        AND ($3::timestamptz IS NULL OR (created_at, lesion_id) < ($3, $4::uuid))
    ORDER BY created_at DESC, lesion_id DESC
    LIMIT $2
) AS l
CROSS JOIN LATERAL (
    SELECT image_id FROM lesion_images
    WHERE lesion_id = l.lesion_id
    ORDER BY created_at DESC, image_id DESC
    LIMIT 1
) AS newest
INNER JOIN (:recorded_image) AS r USING (image_id)
ORDER BY r.lesion_created_at DESC, r.lesion_id DESC;

-- name: open_demand
-- Say what a lesion's images demand that no clinician has answered yet.
SELECT open_demand($1);

-- name: confirm
-- Note that an image is of its lesion, once, and the audit event each time; of an erased image neither.
WITH image AS (
    SELECT image_id, erased_at IS NOT NULL AS erased FROM lesion_images
    WHERE lesion_id = :lesion_id AND image_id = :image_id
),
confirmed AS (
    UPDATE assessments AS a
    SET confirmed_by = coalesce(a.confirmed_by, :confirmed_by), confirmed_at = coalesce(a.confirmed_at, now())
    FROM image AS i
    WHERE a.image_id = i.image_id AND NOT i.erased
    RETURNING a.confirmed_by, a.confirmed_at
),
event AS (:record_event FROM confirmed)
SELECT i.erased, c.confirmed_by, c.confirmed_at
FROM image AS i
LEFT JOIN confirmed AS c ON true;

-- name: assessment_record
-- Find one assessment with its image and lesion.
SELECT r.*, open_demand(r.lesion_id) AS open_demand
FROM (:recorded_image) AS r
WHERE r.assessment_id = $1;

-- name: recorded_case
-- Find what one assessment of a lesion was asked and what it answered; of its image only the size.
SELECT
    i.lesion_id, i.image_id, coalesce(octet_length(i.sealed), 0) AS sealed_bytes,
    a.assessment_id, a.context, a.top_k, jsonb_build_object('licences', a.licences, 'confirmed_only', a.confirmed_only) AS reference_filter, a.answer AS assessment, a.outcome
FROM assessments AS a
INNER JOIN lesion_images AS i USING (image_id)
WHERE i.lesion_id = $1 AND a.assessment_id = $2;

-- name: sealed_image
-- Fetch a sealed image of a lesion; without its bytes once it is erased.
SELECT patient_id, content_type, sealed
FROM lesion_images
WHERE lesion_id = $1 AND image_id = $2;

-- name: pictured
-- Which of the reference images $1 have a picture in the cache.
SELECT isic_id FROM reference_pictures WHERE isic_id = ANY($1::text[]);

-- name: image_embedding
-- Fetch how far an image of a lesion got, and its embedding in the space that it was assessed in.
SELECT a.outcome, i.erased_at IS NOT NULL AS erased, e.embedding_space, e.embedding
FROM lesion_images AS i
INNER JOIN assessments AS a USING (image_id)
LEFT JOIN lesion_embeddings AS e
    ON e.image_id = i.image_id AND e.embedding_space = a.answer #>> '{provenance,embedding_space}'
WHERE i.lesion_id = $1 AND i.image_id = $2;

-- name: record_event
-- Add an audit event on its own; with a FROM, part of the statement that does what it records.
INSERT INTO audit_events
    (action, actor, outcome, patient_id, lesion_id, image_id, assessment_id, request_id, detail)
SELECT
    :event_action, :event_actor, :event_outcome, :event_patient_id, :event_lesion_id,
    :event_image_id, :event_assessment_id, :event_request_id, :event_detail;
