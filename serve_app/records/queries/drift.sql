-- name: try_to_look
-- Say whether this transaction is the one that looks; until it ends, no other does ("dermdrft" in ASCII).
-- Nothing is sorted in it: the planner knows nothing of what is in an answer, takes few to fit, and would read them all.
SELECT pg_try_advisory_xact_lock(7234314190602790516), set_config('enable_sort', 'off', true);

-- name: newest_answer
-- Find what made the newest answer.
SELECT answer -> 'provenance' AS provenance
FROM assessments
WHERE answer IS NOT NULL
ORDER BY completed_at DESC
LIMIT 1;

-- name: stream
-- Find what was begun last for a subject.
SELECT drift_id, since, baseline, baseline_until, seen_until
FROM drift_streams
WHERE stream = $1 AND subject = $2
ORDER BY drift_id DESC
LIMIT 1;

-- name: begin
-- Begin a baseline with the images after those of the stream's subject before, or else with the model's first; of
-- pictures, whose colour balance was not measured before there was this table, with those from then on.
INSERT INTO drift_streams (stream, subject, since)
SELECT $1, $2, coalesce(
    (SELECT max(seen_until) FROM drift_streams WHERE stream = $1),
    (SELECT min(published_at) FROM publications WHERE model_id = $2::jsonb ->> 'model_id'),
    (SELECT applied_at FROM schema_migrations WHERE version = 28)
)
RETURNING drift_id, since, baseline, baseline_until, seen_until;

-- name: make_current
-- Note that a stream is looked at again, after another subject of it was.
UPDATE drift_streams AS d SET looked_at = clock_timestamp()
WHERE d.drift_id = $1
    AND EXISTS (SELECT FROM drift_streams AS o WHERE o.stream = d.stream AND o.looked_at > d.looked_at);

-- name: answered_since
-- Count the answers after a time, up to so many.
SELECT count(*) FROM (
    SELECT FROM assessments WHERE answer IS NOT NULL AND completed_at > $1 LIMIT $2
) AS newer;

-- name: first_images
-- The first images of a stream ($1) and subject after a time.
SELECT completed_at, patient_id, outcome, level, quality, probabilities, embedding FROM answered_images
WHERE completed_at > $3 AND provenance @> $2::jsonb AND $1::text = ANY(streams)
ORDER BY completed_at
LIMIT $4;

-- name: newest_images
-- The same, newest first.
SELECT completed_at, patient_id, outcome, level, quality, probabilities, embedding FROM answered_images
WHERE completed_at > $3 AND provenance @> $2::jsonb AND $1::text = ANY(streams)
ORDER BY completed_at DESC
LIMIT $4;

-- name: note
-- Keep what was found; a baseline that is there stays.
UPDATE drift_streams
SET collected = $2, baseline = coalesce(baseline, $3), baseline_until = coalesce(baseline_until, $4),
    newest = coalesce($5, newest), looked_at = clock_timestamp(),
    seen_until = (SELECT max(completed_at) FROM assessments WHERE answer IS NOT NULL)
WHERE drift_id = $1;

-- name: raise
-- Raise an alarm, unless it stands already.
INSERT INTO drift_alarms (drift_id, measure, distance) VALUES ($1, $2, $3)
ON CONFLICT (drift_id, measure) WHERE ended_at IS NULL DO NOTHING
RETURNING alarm_id;

-- name: end
-- End those alarms that were acknowledged, of measures that are as at first again.
UPDATE drift_alarms SET ended_at = clock_timestamp()
WHERE drift_id = $1 AND measure = ANY($2::text []) AND ended_at IS NULL AND acknowledged_at IS NOT NULL;

-- name: current
-- Say how each stream stands, with its alarms that have not ended.
SELECT
    d.drift_id, d.stream, d.subject, d.collected, d.baseline, d.baseline_until, d.newest, d.looked_at,
    coalesce(
        (
            SELECT jsonb_object_agg(a.measure, jsonb_build_object(
                'raised_at', a.raised_at, 'distance', a.distance, 'acknowledged_at', a.acknowledged_at,
                'acknowledged_by', a.acknowledged_by, 'reason', a.reason
            ))
            FROM drift_alarms AS a
            WHERE a.drift_id = d.drift_id AND a.ended_at IS NULL
        ),
        '{}'
    ) AS alarms
FROM (
    SELECT DISTINCT ON (stream) * FROM drift_streams ORDER BY stream, looked_at DESC
) AS d
ORDER BY d.stream DESC;

-- name: acknowledge
-- Acknowledge a standing alarm.
UPDATE drift_alarms
SET acknowledged_at = clock_timestamp(), acknowledged_by = $3, reason = $4
WHERE drift_id = $1 AND measure = $2 AND ended_at IS NULL AND acknowledged_at IS NULL
RETURNING alarm_id;

-- name: begin_again
-- Have the images from now on make a new baseline of the same subject.
INSERT INTO drift_streams (stream, subject, since, begun_by)
SELECT stream, subject, clock_timestamp(), $2 FROM drift_streams WHERE drift_id = $1
RETURNING drift_id;
