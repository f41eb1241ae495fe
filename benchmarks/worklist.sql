-- name: fill
-- Make $1 lesions of $2 patients with two images each, over a year: demands open and answered, in doubt, failed, refused.
WITH made AS (
    SELECT
        n, gen_random_uuid() AS lesion_id, 'p-' || n % $2::integer AS patient_id,
        now() - random() * interval '300 days' AS created_at
    FROM generate_series(1, $1::integer) AS n
),
lesion AS (
    INSERT INTO lesions (lesion_id, patient_id, created_at)
    SELECT lesion_id, patient_id, created_at FROM made
),
pictured AS (
    SELECT m.*, gen_random_uuid() AS image_id, m.created_at + later * interval '60 days' AS taken_at, random() AS dice
    FROM made AS m
    CROSS JOIN generate_series(0, 1) AS later
),
image AS (
    INSERT INTO lesion_images
        (image_id, lesion_id, patient_id, created_at, content_type, width, height, data_key_id, sealed)
    SELECT image_id, lesion_id, patient_id, taken_at, 'image/png', 600, 450, image_id, 'x'
    FROM pictured
)
INSERT INTO assessments
    (assessment_id, image_id, created_at, outcome, answer, failure, completed_at, context, top_k, licences, actor, request_id,
     demand_level, demand_urgency, demand_answered_at)
SELECT
    image_id, image_id, taken_at, outcome,
    -- Of an answer's size, which is kept apart from the row.
    CASE WHEN outcome IN ('decided', 'review', 'refused') THEN
        (SELECT jsonb_agg(md5(image_id::text || n)) FROM generate_series(1, 100) AS n)
    END,
    CASE WHEN outcome = 'failed' THEN 'integrity' END,
    CASE WHEN outcome <> 'pending' THEN taken_at END,
    '{}', 10, '{}', 'dr', 'r', level, urgency, CASE WHEN level IS NOT NULL AND dice < 0.6 THEN taken_at END
FROM pictured
CROSS JOIN LATERAL (
    SELECT
        CASE
            WHEN dice < 0.01 THEN 'failed' WHEN dice < 0.05 THEN 'refused' WHEN dice < 0.2 THEN 'review'
            WHEN dice > 0.999 THEN 'pending' ELSE 'decided'
        END AS outcome,
        (ARRAY['low', 'low', 'low', 'medium', 'high']::risk_level[])[1 + n % 5] AS any_level,
        (ARRAY['routine', 'routine', 'routine', 'expedited', 'urgent']::urgency[])[1 + n % 5] AS any_urgency
) AS made_of
CROSS JOIN LATERAL (
    SELECT
        CASE WHEN outcome IN ('decided', 'review') THEN any_level END AS level,
        CASE WHEN outcome IN ('decided', 'review') THEN any_urgency END AS urgency
) AS demanded;

-- name: decide
-- Record a decision on each answered demand, every third with a day to be seen again.
INSERT INTO reviews (review_id, assessment_id, clinician, request_id, recorded_at, decision, level, urgency, follow_up_by)
SELECT
    gen_random_uuid(), assessment_id, 'dr', 'r', demand_answered_at, 'accept', demand_level, demand_urgency,
    CASE WHEN random() < 0.33 THEN (demand_answered_at + interval '90 days')::date END
FROM assessments
WHERE demand_answered_at IS NOT NULL;

-- name: care
-- Put $2 patients into a clinician's care; and each patient into that of one of 49 others.
INSERT INTO care_assignments (patient_id, clinician, starts_at)
SELECT 'p-' || n, $1, now() - interval '1 year' FROM generate_series(0, $2::integer - 1) AS n
UNION ALL
SELECT DISTINCT patient_id, 'dr-' || hashtext(patient_id) % 49, now() - interval '1 year' FROM lesions;
