-- name: take_token
-- Take a token of an EHR, once.
INSERT INTO hook_tokens (client, jti_sha256) VALUES ($1, $2)
ON CONFLICT DO NOTHING
RETURNING true;

-- name: forget_tokens
-- Let go of tokens that were taken longer ago than this.
DELETE FROM hook_tokens WHERE seen_at < now() - $1::interval;

-- name: identify
-- Whom an EHR means by a user and by a patient of its own, and whether that user is locked out.
SELECT
    u.own_id AS subject,
    p.own_id AS patient_id,
    EXISTS (SELECT FROM revocations AS r WHERE r.kind = 'subject' AND r.value = u.own_id) AS revoked
FROM (VALUES ($1::text, $2::text, $3::text)) AS asked (client, fhir_user, fhir_patient)
LEFT JOIN hook_identities AS u ON u.client = asked.client AND u.kind = 'user' AND u.fhir_id = asked.fhir_user
LEFT JOIN hook_identities AS p ON p.client = asked.client AND p.kind = 'patient' AND p.fhir_id = asked.fhir_patient;

-- name: due
-- What a patient's lesions wait for: demands that no clinician has answered, and follow-ups that are overdue, as the
-- worklist has them, lesions that are linked as one. The most pressing first.
WITH images AS (
    SELECT
        l.head, i.lesion_id, a.assessment_id, i.image_id, i.created_at, a.demand_level AS level, a.demand_urgency AS urgency,
        a.demand_level IS NOT NULL AND a.demand_answered_at IS NULL AS demands,
        max(i.created_at) FILTER (WHERE i.erased_at IS NULL) OVER (PARTITION BY l.head) AS newest
    FROM lesion_heads AS l
    INNER JOIN lesion_images AS i USING (lesion_id)
    INNER JOIN assessments AS a USING (image_id)
    WHERE l.patient_id = $1
),
demands AS (
    SELECT DISTINCT ON (head)
        lesion_id, assessment_id, max(level) OVER lesion AS level, max(urgency) OVER lesion AS urgency, created_at AS since
    FROM images
    WHERE demands
    WINDOW lesion AS (PARTITION BY head)
    ORDER BY head, images.level DESC, images.urgency DESC, created_at, image_id
),
due AS (
    SELECT
        'open_demand' AS kind, lesion_id, assessment_id, NULL::uuid AS review_id, level, urgency, since,
        NULL::date AS follow_up_by
    FROM demands
    UNION ALL
    SELECT 'follow_up', f.lesion_id, f.assessment_id, f.review_id, f.level, f.urgency, f.recorded_at, f.follow_up_by
    FROM (:follow_ups) AS f
    WHERE f.follow_up_by < (now() AT TIME ZONE 'UTC')::date
)
SELECT
    d.*, i.image_id, i.encounter_id, i.erased_at IS NOT NULL AS erased,
    a.context ->> 'anatom_site_general' AS site
FROM due AS d
INNER JOIN assessments AS a USING (assessment_id)
INNER JOIN lesion_images AS i USING (image_id)
ORDER BY d.urgency DESC NULLS LAST, d.level DESC NULLS LAST, d.since, d.assessment_id, d.kind;

-- name: show
-- Note the cards that an EHR is given, each once, and the audit event.
WITH shown AS (
    INSERT INTO hook_cards (card_id, client, kind, assessment_id, review_id)
    SELECT n.card_id, :client, n.kind, n.assessment_id, n.review_id
    FROM unnest(:cards::uuid[], :kinds::text[], :assessments::uuid[], :reviews::uuid[])
        AS n (card_id, kind, assessment_id, review_id)
    ON CONFLICT DO NOTHING
)
:record_event;

-- name: shown
-- Of these cards, those that this EHR was given, and what each is about.
SELECT c.card_id, c.assessment_id, i.image_id, i.lesion_id, i.patient_id
FROM hook_cards AS c
INNER JOIN assessments AS a USING (assessment_id)
INNER JOIN lesion_images AS i USING (image_id)
WHERE c.client = $1 AND c.card_id = ANY($2::uuid[])
ORDER BY i.patient_id, c.card_id;

-- name: add_feedback
-- Add what became of a card, once; of an erased image without the comment. The lock has an erasure wait, or be waited for.
INSERT INTO hook_feedback (feedback_id, card_id, outcome, reason_system, reason_code, comment, outcome_at)
SELECT
    $1, c.card_id, $3, $4, $5, CASE WHEN a.outcome NOT IN ('erased', 'cancelled') THEN $6::text END, $7
FROM hook_cards AS c
INNER JOIN assessments AS a USING (assessment_id)
WHERE c.card_id = $2
FOR SHARE OF a
ON CONFLICT (card_id, outcome, outcome_at) DO NOTHING
RETURNING *;

-- name: feedback_of_lesion
-- What became of the cards of a lesion and of those that are linked with it, as their EHRs say, oldest first.
SELECT
    f.feedback_id, c.card_id, c.client, c.kind, c.assessment_id, c.review_id, f.outcome, f.reason_system, f.reason_code,
    f.comment, f.outcome_at, f.recorded_at
FROM lesion_images AS i
INNER JOIN assessments AS a USING (image_id)
INNER JOIN hook_cards AS c USING (assessment_id)
INNER JOIN hook_feedback AS f USING (card_id)
WHERE i.lesion_id = ANY(same_lesions($1))
ORDER BY f.recorded_at, f.feedback_id;

-- name: map
-- Have an EHR mean somebody by an id of its own; once.
INSERT INTO hook_identities (client, kind, fhir_id, own_id, mapped_by) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT DO NOTHING
RETURNING *;

-- name: unmap
-- Have an EHR mean nobody by an id of its own.
DELETE FROM hook_identities WHERE client = $1 AND kind = $2 AND fhir_id = $3
RETURNING *, true AS gone;

-- name: identities
-- Whom EHRs mean: one EHR's, or all.
SELECT client, kind, fhir_id, own_id, mapped_at, mapped_by
FROM hook_identities
WHERE $1::text IS NULL OR client = $1
ORDER BY client, kind DESC, fhir_id COLLATE "C";
