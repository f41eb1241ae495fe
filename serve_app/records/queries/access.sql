-- name: is_revoked
-- Say whether a subject, or this one token of it, is locked out.
SELECT EXISTS (
    SELECT FROM revocations
    WHERE (kind = 'subject' AND value = $1) OR (kind = 'token' AND value = $2)
);

-- name: revoke
-- Lock a subject or a token out; again, it stays as it was first.
INSERT INTO revocations (kind, value, revoked_by)
VALUES ($1, $2, $3)
ON CONFLICT (kind, value) DO NOTHING
RETURNING *;

-- name: restore
-- Let a subject or a token in again.
DELETE FROM revocations
WHERE kind = $1 AND value = $2
RETURNING *, true AS gone;

-- name: revocations
-- List who is locked out, newest first.
SELECT kind, value, revoked_at, revoked_by
FROM revocations
ORDER BY revoked_at DESC, kind, value;

-- name: assign
-- Put a patient into somebody's care; again with the same start, change the end.
INSERT INTO care_assignments (patient_id, clinician, starts_at, ends_at)
VALUES ($1, $2, $3, $4)
ON CONFLICT (clinician, patient_id, starts_at) DO UPDATE SET ends_at = excluded.ends_at
RETURNING *;

-- name: end_assignment
-- End what is in force of somebody's care for a patient, and withdraw what has not begun.
WITH ended AS (
    UPDATE care_assignments SET ends_at = now()
    WHERE patient_id = $1 AND clinician = $2 AND starts_at < now() AND (ends_at IS NULL OR ends_at > now())
    RETURNING *
),
withdrawn AS (
    DELETE FROM care_assignments
    WHERE patient_id = $1 AND clinician = $2 AND starts_at >= now()
    RETURNING *
)
SELECT *, false AS gone FROM ended UNION ALL SELECT *, true FROM withdrawn;

-- name: assignments
-- List care assignments of a patient, a principal, or all: those in force or to come, or ($3) every one.
SELECT patient_id, clinician, starts_at, ends_at
FROM care_assignments
WHERE ($1::text IS NULL OR patient_id = $1)
    AND ($2::text IS NULL OR clinician = $2)
    AND ($3::boolean OR ends_at IS NULL OR ends_at > now())
ORDER BY patient_id, clinician, starts_at;

-- name: break_glass
-- Let a principal into a patient's record for a time.
INSERT INTO emergency_accesses (emergency_id, patient_id, principal, reason, ends_at)
VALUES ($1, $2, $3, $4, now() + $5::interval)
RETURNING *;

-- name: emergency
-- Find one emergency access.
SELECT * FROM emergency_accesses WHERE emergency_id = $1;

-- name: emergencies
-- List emergency accesses, oldest first, from behind one on: those to review, or ($1) those reviewed;
-- each with what was done under it, by action and outcome.
SELECT
    e.*,
    (
        SELECT coalesce(jsonb_object_agg(done.action, done.times), '{}'::jsonb)
        FROM (
            SELECT a.action, count(*) AS times
            FROM audit_events AS a
            WHERE a.detail ? 'emergency_access'
                AND a.detail ->> 'emergency_access' = e.emergency_id::text
                AND a.actor = e.principal
                AND a.outcome = 'success'
                AND a.action <> 'break_glass'
            GROUP BY a.action
        ) AS done
    ) AS accesses
FROM emergency_accesses AS e
WHERE (e.reviewed_at IS NOT NULL) = $1::boolean
    AND ($2::uuid IS NULL OR e.emergency_id > $2)
ORDER BY e.emergency_id
LIMIT $3;

-- name: review
-- Judge an emergency access that nobody has judged. What was not justified ends, with every other access that the
-- same principal still has to the same patient: these others come behind it.
WITH reviewed AS (
    UPDATE emergency_accesses
    SET reviewed_at = now(), reviewer = $2, review_outcome = $3, review_note = $4,
        ended_at = CASE WHEN $3 = 'not_justified' AND ends_at > now() THEN coalesce(ended_at, now()) ELSE ended_at END,
        ended_by = CASE WHEN $3 = 'not_justified' AND ends_at > now() THEN coalesce(ended_by, $2) ELSE ended_by END
    WHERE emergency_id = $1 AND reviewed_at IS NULL
    RETURNING *
),
others AS (
    UPDATE emergency_accesses AS o
    SET ended_at = now(), ended_by = $2
    FROM reviewed AS r
    WHERE r.review_outcome = 'not_justified'
        AND o.principal = r.principal
        AND o.patient_id = r.patient_id
        AND o.emergency_id <> r.emergency_id
        AND o.ends_at > now()
        AND o.ended_at IS NULL
    RETURNING o.*
)
SELECT * FROM (SELECT *, true AS judged FROM reviewed UNION ALL SELECT *, false FROM others) AS found
ORDER BY judged DESC, emergency_id;

-- name: end_emergency
-- End an emergency access that is in force.
UPDATE emergency_accesses
SET ended_at = now(), ended_by = $2
WHERE emergency_id = $1 AND ends_at > now() AND ended_at IS NULL
RETURNING *;

-- name: open_emergencies
-- List emergency accesses of a patient, a principal, or all, oldest first: those in force, or ($3) every one.
SELECT * FROM emergency_accesses
WHERE ($1::text IS NULL OR patient_id = $1)
    AND ($2::text IS NULL OR principal = $2)
    AND ($3::boolean OR (ends_at > now() AND ended_at IS NULL))
ORDER BY emergency_id;
