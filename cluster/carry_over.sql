-- name: newest_event
-- The last event of a backup: a database that has the same one goes on from there.
SELECT event_id, recorded_at, request_id FROM audit_events ORDER BY event_id DESC LIMIT 1;

-- name: has_event
-- Whether it has this very event.
SELECT EXISTS (
    SELECT FROM audit_events WHERE event_id = $1 AND recorded_at = $2 AND request_id = $3
);

-- name: read
-- Who may do what, what is held and whose record is closed, in the database that is to be replaced.
SELECT jsonb_build_object(
    'revocations', (SELECT coalesce(jsonb_agg(to_jsonb(r)), '[]') FROM revocations AS r),
    'care_assignments', (SELECT coalesce(jsonb_agg(to_jsonb(c)), '[]') FROM care_assignments AS c),
    'emergency_accesses', (
        SELECT coalesce(jsonb_agg(to_jsonb(e) - 'reason' - 'review_note'), '[]') FROM emergency_accesses AS e
    ),
    'legal_holds', (SELECT coalesce(jsonb_agg(to_jsonb(h)), '[]') FROM legal_holds AS h WHERE h.released_at IS NULL),
    'closed_records', (SELECT coalesce(jsonb_agg(to_jsonb(c)), '[]') FROM closed_records AS c)
)::text;

-- name: revocations
-- Lock out who was locked out.
INSERT INTO revocations
SELECT * FROM jsonb_populate_recordset(null::revocations, $1::text::jsonb -> 'revocations')
ON CONFLICT (kind, value) DO NOTHING
RETURNING 'revoke' AS action, jsonb_build_object(kind, value)::text AS detail;

-- name: legal_holds
-- Hold what was held, as far as it is here. A hold that the backup has is in force there: nothing else is older.
INSERT INTO legal_holds
SELECT h.*
FROM jsonb_populate_recordset(null::legal_holds, $1::text::jsonb -> 'legal_holds') AS h
WHERE (h.lesion_id IS NULL OR EXISTS (SELECT FROM lesions AS l WHERE l.lesion_id = h.lesion_id))
    AND (h.image_id IS NULL OR EXISTS (SELECT FROM lesion_images AS i WHERE i.image_id = h.image_id))
ON CONFLICT (hold_id) DO NOTHING
RETURNING 'hold_set' AS action, jsonb_build_object('hold_id', hold_id)::text AS detail, lesion_id, image_id, coalesce(
    patient_id,
    (SELECT l.patient_id FROM lesions AS l WHERE l.lesion_id = legal_holds.lesion_id),
    (SELECT i.patient_id FROM lesion_images AS i WHERE i.image_id = legal_holds.image_id)
) AS patient_id;

-- name: withdrawn_care
-- Withdraw care that was withdrawn before it began.
DELETE FROM care_assignments AS c
WHERE NOT EXISTS (
    SELECT FROM jsonb_populate_recordset(null::care_assignments, $1::text::jsonb -> 'care_assignments') AS n
    WHERE n.clinician = c.clinician AND n.patient_id = c.patient_id AND n.starts_at = c.starts_at
)
RETURNING 'end_assignment' AS action, jsonb_build_object('subject', c.clinician)::text AS detail, c.patient_id;

-- name: ended_care
-- End care that was ended.
UPDATE care_assignments AS c
SET ends_at = n.ends_at
FROM jsonb_populate_recordset(null::care_assignments, $1::text::jsonb -> 'care_assignments') AS n
WHERE n.clinician = c.clinician AND n.patient_id = c.patient_id AND n.starts_at = c.starts_at
    AND n.ends_at < coalesce(c.ends_at, 'infinity')
RETURNING 'end_assignment' AS action, jsonb_build_object('subject', c.clinician)::text AS detail, c.patient_id;

-- name: ended_emergencies
-- End emergency accesses that were ended before their time.
UPDATE emergency_accesses AS e
SET ends_at = n.ends_at
FROM jsonb_populate_recordset(null::emergency_accesses, $1::text::jsonb -> 'emergency_accesses') AS n
WHERE n.emergency_id = e.emergency_id AND n.ends_at < e.ends_at
RETURNING 'end_emergency' AS action, jsonb_build_object('emergency_id', e.emergency_id)::text AS detail, e.patient_id;

-- name: reopened_records
-- Open records that were opened again.
DELETE FROM closed_records AS c
WHERE NOT EXISTS (
    SELECT FROM jsonb_populate_recordset(null::closed_records, $1::text::jsonb -> 'closed_records') AS n
    WHERE n.patient_id = c.patient_id
)
RETURNING 'record_reopen' AS action, '{}' AS detail, c.patient_id;

-- name: closed_later
-- Close records when they were closed again: their time begins there.
UPDATE closed_records AS c
SET closed_at = n.closed_at, closed_by = n.closed_by
FROM jsonb_populate_recordset(null::closed_records, $1::text::jsonb -> 'closed_records') AS n
WHERE n.patient_id = c.patient_id AND n.closed_at > c.closed_at
RETURNING 'record_close' AS action, '{}' AS detail, c.patient_id;
