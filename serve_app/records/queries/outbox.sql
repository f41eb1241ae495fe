-- name: claim
-- Lease what is due: of each encounter only its oldest waiting message, so that its order is kept; of the reports, which
-- have no encounter, likewise. Senders pass each other by.
WITH due AS (
    SELECT o.message_id
    FROM outbox AS o
    WHERE o.delivered_at IS NULL
        AND o.dead_at IS NULL
        AND o.kind = ANY($3::text[])
        AND o.due_at <= now()
        AND (o.lease_until IS NULL OR o.lease_until < now())
        AND NOT EXISTS (
            SELECT FROM outbox AS earlier
            WHERE coalesce(earlier.encounter_id, '') = coalesce(o.encounter_id, '')
                AND earlier.position < o.position
                AND earlier.delivered_at IS NULL
                AND earlier.dead_at IS NULL
        )
    ORDER BY o.due_at, o.position
    LIMIT $2
    FOR UPDATE SKIP LOCKED
),
claimed AS (
    UPDATE outbox AS o
    SET lease_until = now() + $1::interval, attempts = o.attempts + 1
    FROM due AS d
    WHERE o.message_id = d.message_id
    RETURNING
        o.position, o.message_id, o.kind, o.assessment_id, o.subject_id, o.encounter_id, o.waiting_since, o.attempts,
        o.setbacks, o.sent_at
)
SELECT message_id, kind, assessment_id, subject_id, encounter_id, waiting_since, attempts, setbacks, sent_at
FROM claimed
ORDER BY position;

-- name: note_sent
-- Note when a message was first sent, before it is: from then on the PMS may have it.
UPDATE outbox SET sent_at = coalesce(sent_at, now()) WHERE message_id = $1 AND delivered_at IS NULL
RETURNING true;

-- name: deliver
-- Note a message as delivered, with the audit event of the disclosure, once; a dead one that a late
-- answer brought there, too. Not so when the assessment is no longer what was told of it.
WITH delivered AS (
    UPDATE outbox AS o
    SET delivered_at = now(), dead_at = NULL, lease_until = NULL, last_error = NULL
    WHERE o.message_id = :message_id
        AND o.delivered_at IS NULL
        AND (
            o.kind <> 'assessment'
            OR EXISTS (SELECT FROM assessments AS a WHERE a.assessment_id = o.assessment_id AND a.outcome = :told)
        )
    RETURNING o.message_id
),
event AS (:record_event FROM delivered)
SELECT EXISTS (SELECT FROM delivered);

-- name: note_overtaken
-- Record the disclosure of what was erased while it was being told: its message was withdrawn, or tells of the erasure.
:record_event
WHERE NOT EXISTS (
    SELECT FROM outbox AS o
    LEFT JOIN assessments AS a USING (assessment_id)
    WHERE o.message_id = :message_id AND (o.kind <> 'assessment' OR a.outcome = :told)
);

-- name: postpone
-- Let a message wait before the next attempt, and say why. Where it may ($4), the attempt counts against the
-- message when another one was delivered since the attempt before.
UPDATE outbox AS o
SET due_at = now() + $2::interval, lease_until = NULL, last_error = $3,
    set_back_at = CASE WHEN $4::boolean THEN now() ELSE o.set_back_at END,
    setbacks = o.setbacks + ($4::boolean AND EXISTS (
        SELECT FROM outbox AS other WHERE other.delivered_at > o.set_back_at
    ))::integer
WHERE o.message_id = $1 AND o.delivered_at IS NULL AND o.dead_at IS NULL;

-- name: give_up
-- Note a message as dead, and why.
UPDATE outbox
SET dead_at = now(), lease_until = NULL, last_error = $2
WHERE message_id = $1 AND delivered_at IS NULL AND dead_at IS NULL;

-- name: drop
-- Be done with a message without sending it; why stays on record.
UPDATE outbox
SET delivered_at = now(), dead_at = NULL, lease_until = NULL, last_error = $2
WHERE message_id = $1 AND delivered_at IS NULL;

-- name: counts
-- Count what waits and what is dead, and say how long the oldest has waited.
SELECT
    (SELECT count(*) FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL) AS waiting,
    (
        SELECT count(*) FROM outbox
        WHERE delivered_at IS NULL AND dead_at IS NULL AND sent_at IS NULL AND attempts > 0
    ) AS unconfirmed,
    (SELECT count(*) FROM outbox WHERE dead_at IS NOT NULL) AS dead,
    (SELECT count(*) FROM outbox WHERE dead_at IS NOT NULL AND last_error = 'wrong_encounter') AS wrong_encounter,
    (
        SELECT extract(epoch FROM now() - min(queued_at))::float8
        FROM outbox
        WHERE delivered_at IS NULL AND dead_at IS NULL
    ) AS oldest_waiting_s;

-- name: list
-- List what was not delivered, oldest first; only the dead when asked so.
SELECT message_id, kind, assessment_id, encounter_id, queued_at, attempts, due_at, sent_at, last_error, dead_at
FROM outbox
WHERE delivered_at IS NULL AND (dead_at IS NOT NULL OR NOT $1::boolean)
ORDER BY position
LIMIT $2;

-- name: retry
-- Have messages that were not delivered sent at once: one, or (without an id) all dead ones, with
-- an audit event each. It has its whole time again.
WITH revived AS (
    UPDATE outbox
    SET dead_at = NULL, due_at = now(), waiting_since = now(), setbacks = 0, set_back_at = NULL
    WHERE delivered_at IS NULL
        AND CASE WHEN $1::uuid IS NULL THEN dead_at IS NOT NULL ELSE message_id = $1 END
    RETURNING message_id, assessment_id
),
event AS (
    INSERT INTO audit_events (action, actor, outcome, assessment_id, request_id, detail)
    SELECT 'outbox_retry', $2, 'success', assessment_id, $3, jsonb_build_object('message_id', message_id, 'purpose', 'HSYSADMIN')
    FROM revived
)
SELECT count(*) FROM revived;
