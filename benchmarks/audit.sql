-- name: written
-- The events of uploads, as they are hashed.
SELECT 0::bigint, event_id, ''::bytea, event_id, recorded_at, action, actor, outcome, patient_id, lesion_id, image_id, assessment_id, request_id, detail
FROM audit_events WHERE action IN ('upload', 'assess');

-- name: multiply
-- Write $1 more events, each like one of the newest 100.
INSERT INTO audit_events (action, actor, outcome, patient_id, lesion_id, image_id, assessment_id, request_id, detail)
SELECT action, actor, outcome, patient_id, lesion_id, image_id, assessment_id, request_id, detail
FROM (SELECT * FROM audit_events ORDER BY event_id DESC LIMIT 100) AS e
CROSS JOIN generate_series(1, $1::integer / 100 + 1)
LIMIT $1;
