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

-- name: has_table
-- Whether it has this table.
SELECT to_regclass($1) IS NOT NULL;

-- name: read_identities
-- Beside that ($1), whom EHRs mean there.
SELECT ($1::text::jsonb || jsonb_build_object(
    'hook_identities', (SELECT coalesce(jsonb_agg(to_jsonb(h)), '[]') FROM hook_identities AS h)
))::text;

-- name: revoke
-- Lock out who was locked out.
INSERT INTO revocations (kind, value, revoked_at, revoked_by)
SELECT n.kind, n.value, n.revoked_at, n.revoked_by
FROM jsonb_populate_recordset(null::revocations, $1::text::jsonb -> 'revocations') AS n
ON CONFLICT (kind, value) DO NOTHING
RETURNING *;

-- name: hold
-- Hold what was held, as far as it is here.
INSERT INTO legal_holds (hold_id, patient_id, lesion_id, image_id, reason, set_by, set_at)
SELECT n.hold_id, n.patient_id, n.lesion_id, n.image_id, n.reason, n.set_by, n.set_at
FROM jsonb_populate_recordset(null::legal_holds, $1::text::jsonb -> 'legal_holds') AS n
WHERE (n.lesion_id IS NULL OR EXISTS (SELECT FROM lesions AS l WHERE l.lesion_id = n.lesion_id))
    AND (n.image_id IS NULL OR EXISTS (SELECT FROM lesion_images AS i WHERE i.image_id = n.image_id))
ON CONFLICT (hold_id) DO NOTHING
RETURNING
    *,
    coalesce(
        patient_id,
        (SELECT l.patient_id FROM lesions AS l WHERE l.lesion_id = legal_holds.lesion_id),
        (SELECT i.patient_id FROM lesion_images AS i WHERE i.image_id = legal_holds.image_id)
    ) AS of_patient;

-- name: withdraw_care
-- Withdraw care that was withdrawn before it began.
DELETE FROM care_assignments AS c
WHERE NOT EXISTS (
    SELECT FROM jsonb_populate_recordset(null::care_assignments, $1::text::jsonb -> 'care_assignments') AS n
    WHERE n.clinician = c.clinician AND n.patient_id = c.patient_id AND n.starts_at = c.starts_at
)
RETURNING *, true AS gone;

-- name: end_care
-- End care that was ended.
UPDATE care_assignments AS c
SET ends_at = n.ends_at
FROM jsonb_populate_recordset(null::care_assignments, $1::text::jsonb -> 'care_assignments') AS n
WHERE n.clinician = c.clinician AND n.patient_id = c.patient_id AND n.starts_at = c.starts_at
    AND n.ends_at < coalesce(c.ends_at, 'infinity')
RETURNING c.*;

-- name: end_emergency
-- End emergency accesses that were ended before their time, whichever way a version notes that.
UPDATE emergency_accesses AS e
SET ends_at = least(n.ended_at, n.ends_at)
FROM jsonb_to_recordset($1::text::jsonb -> 'emergency_accesses')
    AS n (emergency_id uuid, ends_at timestamptz, ended_at timestamptz)
WHERE n.emergency_id = e.emergency_id AND least(n.ended_at, n.ends_at) < e.ends_at
RETURNING e.*;

-- name: reopen
-- Open records that were opened again.
DELETE FROM closed_records AS c
WHERE NOT EXISTS (
    SELECT FROM jsonb_populate_recordset(null::closed_records, $1::text::jsonb -> 'closed_records') AS n
    WHERE n.patient_id = c.patient_id
)
RETURNING *, true AS gone;

-- name: close_later
-- Have the time of a record that was opened and closed again run from the later moment.
UPDATE closed_records AS c
SET closed_at = n.closed_at, closed_by = n.closed_by
FROM jsonb_populate_recordset(null::closed_records, $1::text::jsonb -> 'closed_records') AS n
WHERE n.patient_id = c.patient_id AND n.closed_at > c.closed_at
RETURNING c.*;

-- name: unmap
-- Have EHRs mean nobody by an id that they no longer mean the same by.
DELETE FROM hook_identities AS h
WHERE $1::text::jsonb ? 'hook_identities' AND NOT EXISTS (
    SELECT FROM jsonb_populate_recordset(null::hook_identities, $1::text::jsonb -> 'hook_identities') AS n
    WHERE (n.client, n.kind, n.fhir_id, n.own_id) = (h.client, h.kind, h.fhir_id, h.own_id)
)
RETURNING *, true AS gone;
