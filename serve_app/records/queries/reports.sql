-- name: count
-- Count what came in since the last time, up to so many entries of the queue.
SELECT count_reports($1);

-- name: cells
-- The counts of tables ($1) of a month ($2), and of all months before where they are asked for ($3).
SELECT tab, key, sum(n)::bigint AS n
FROM report_cells
WHERE tab = ANY($1::text[]) AND (month = $2 OR $3 AND month < $2)
GROUP BY tab, key
HAVING sum(n) <> 0
ORDER BY tab, key;

-- name: find
-- Find a report as it was made.
SELECT report_id, kind, period, made_at, document FROM report_snapshots WHERE kind = $1 AND period = $2;

-- name: snapshot
-- Find a report by its id.
SELECT report_id, kind, period, made_at, document FROM report_snapshots WHERE report_id = $1;

-- name: published
-- All reports of a kind, as they were made, the oldest first.
SELECT report_id, kind, period, made_at, document FROM report_snapshots WHERE kind = $1 ORDER BY period;

-- name: keep
-- Put a report on record, unless there is one of its kind and period.
INSERT INTO report_snapshots (report_id, kind, period, document) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING;

-- name: assessed_encounters
-- Encounters of a month ($1) that had an image assessed.
SELECT count(DISTINCT i.encounter_id)
FROM assessment_facts AS f
INNER JOIN assessments AS a USING (assessment_id)
INNER JOIN lesion_images AS i USING (image_id)
WHERE f.completed_on >= $1 AND f.completed_on < $1 + interval '1 month';

-- name: push
-- Have the PMS told of a report, once.
INSERT INTO outbox (message_id, kind, subject_id)
VALUES ($1, 'report', $2)
ON CONFLICT (subject_id) WHERE kind = 'report' DO NOTHING
RETURNING message_id;
