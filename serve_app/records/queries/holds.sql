-- name: against_erasure
-- Until this transaction ends, no erasure is accepted; those on their way are waited for ("dermhold" in ASCII).
SELECT pg_advisory_xact_lock(7234314190669704292);

-- name: find_patient
-- Whose the held thing is; of an image, whether it is erased already.
SELECT coalesce($1, l.patient_id, i.patient_id) AS patient_id, i.erased_at IS NOT NULL AS erased
FROM (VALUES ($2::uuid, $3::uuid)) AS asked (lesion_id, image_id)
LEFT JOIN lesions AS l ON l.lesion_id = asked.lesion_id
LEFT JOIN lesion_images AS i ON i.image_id = asked.image_id;

-- name: set
-- Put a hold in force.
INSERT INTO legal_holds (hold_id, patient_id, lesion_id, image_id, reason, set_by)
VALUES ($1, $2, $3, $4, $5, $6)
RETURNING *;

-- name: release
-- Take a hold out of force, once.
UPDATE legal_holds AS h
SET released_at = clock_timestamp(), released_by = $2
WHERE h.hold_id = $1 AND h.released_at IS NULL
RETURNING
    *,
    coalesce(h.patient_id, (SELECT l.patient_id FROM lesions AS l WHERE l.lesion_id = h.lesion_id),
             (SELECT i.patient_id FROM lesion_images AS i WHERE i.image_id = h.image_id)) AS of_patient;

-- name: list
-- List holds, newest first; those that were released too when $1.
SELECT hold_id, patient_id, lesion_id, image_id, reason, set_by, set_at, released_by, released_at
FROM legal_holds
WHERE $1 OR released_at IS NULL
ORDER BY set_at DESC, hold_id;
