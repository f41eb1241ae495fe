-- name: accept
-- Accept an erasure, in one transaction with all that it destroys: accepted, erased, held or absent.
SELECT erase_image(:lesion_id, :image_id, :receipt_id, :reason, :note, :actor, :request_id);

-- name: find
-- Find an image's erasure, with its proof where there is one already.
SELECT
    e.receipt_id, i.lesion_id, e.image_id, i.patient_id, e.data_key_id, e.ciphertext_sha256, e.reason, e.actor,
    e.request_id, r.erased_at, r.record_hash
FROM erasures AS e
INNER JOIN lesion_images AS i USING (image_id)
LEFT JOIN erasure_receipts AS r USING (receipt_id)
WHERE i.lesion_id = $1 AND e.image_id = $2;

-- name: unproven
-- List accepted erasures that have no receipt after this long, by receipt, from behind one on.
SELECT e.receipt_id, i.lesion_id, e.image_id
FROM erasures AS e
INNER JOIN lesion_images AS i USING (image_id)
WHERE e.accepted_at < now() - $1::interval AND e.receipt_id > $2
    AND NOT EXISTS (SELECT FROM erasure_receipts AS r WHERE r.receipt_id = e.receipt_id)
ORDER BY e.receipt_id
LIMIT $3;

-- name: prove
-- Add the receipt and its audit event, once, and have the PMS told (if a message is asked for): by a message of its
-- own, or by the assessment's, which was delivered before and is now due again; with :fhir, by the lesion's report, too, in
-- each encounter that may have had one, or one of a lesion that is or was linked with it: each tells of all their images.
WITH proven AS (
    INSERT INTO erasure_receipts (receipt_id, erased_at, record_hash) VALUES (:receipt_id, :erased_at, :record_hash)
    ON CONFLICT (receipt_id) DO NOTHING
    RETURNING receipt_id
),
erased AS (
    SELECT i.* FROM proven
    INNER JOIN erasures AS e USING (receipt_id)
    INNER JOIN lesion_images AS i USING (image_id)
),
queued AS (
    INSERT INTO outbox (message_id, kind, assessment_id, encounter_id)
    SELECT m.message_id, m.kind, m.assessment_id, m.encounter_id
    FROM (
        SELECT 1 AS place, :message_id::uuid AS message_id, 'assessment' AS kind, a.assessment_id, e.encounter_id
        FROM erased AS e
        INNER JOIN assessments AS a USING (image_id)
        WHERE :message_id::uuid IS NOT NULL AND e.encounter_id IS NOT NULL
        UNION ALL
        (
            SELECT DISTINCT ON (i.lesion_id, i.encounter_id) 2, gen_random_uuid(), 'fhir', a.assessment_id, i.encounter_id
            FROM erased AS e
            INNER JOIN lesion_images AS i ON i.lesion_id = ANY(same_lesions(e.lesion_id, true))
            INNER JOIN assessments AS a ON a.image_id = i.image_id
            WHERE :fhir::boolean AND i.encounter_id IS NOT NULL AND a.outcome <> 'pending' AND (
                i.image_id = e.image_id
                OR EXISTS (
                    SELECT FROM outbox AS o
                    WHERE o.assessment_id = a.assessment_id
                        AND o.kind = 'fhir'
                        AND (o.sent_at IS NOT NULL OR o.lease_until IS NOT NULL)
                )
            )
            ORDER BY i.lesion_id, i.encounter_id, i.created_at DESC
        )
    ) AS m
    ORDER BY m.place
    ON CONFLICT (assessment_id) WHERE kind = 'assessment' DO UPDATE
    SET delivered_at = NULL, dead_at = NULL, lease_until = NULL, last_error = NULL,
        attempts = 0, queued_at = now(), waiting_since = now(), due_at = now()
)
:record_event FROM proven;

-- name: restored
-- Images that are there, with their ciphertext, of these data keys.
SELECT data_key_id, lesion_id, image_id
FROM lesion_images
WHERE data_key_id = ANY($1::uuid[]) AND erased_at IS NULL;
