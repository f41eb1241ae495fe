-- name: generate
-- Write lesions, images and finished assessments $1 to $2, as two years of uploads left them: $3 lesions in all.
WITH drawn AS (
    SELECT
        n, md5('image' || n)::uuid AS image_id, md5('assessment' || n)::uuid AS assessment_id,
        md5('lesion' || (n * 7919::bigint) % $3)::uuid AS lesion_id,
        date_trunc('month', now()) - interval '1 hour' - random() * interval '23 months' AS at,
        random() AS how, random() AS p, (random() * 8)::integer AS class, (random() * 110)::integer AS age
    FROM generate_series($1::bigint, $2::bigint) AS n
),
lesion AS (
    INSERT INTO lesions (lesion_id, patient_id, created_at)
    SELECT DISTINCT ON (lesion_id) lesion_id, 'p', now() FROM drawn
    ON CONFLICT DO NOTHING
),
image AS (
    INSERT INTO lesion_images
        (image_id, lesion_id, patient_id, encounter_id, created_at, content_type, width, height, data_key_id, sealed)
    SELECT image_id, lesion_id, 'p', 'e-' || n % 700000, at, 'image/png', 600, 450, image_id, '\x00' FROM drawn
)
INSERT INTO assessments (
    assessment_id, image_id, created_at, completed_at, outcome, context, top_k, licences, actor, request_id, failure, answer,
    demand_level, demand_urgency
)
SELECT
    d.assessment_id, d.image_id, d.at, d.at + random() ^ 3 * interval '4 seconds', o.outcome,
    jsonb_strip_nulls(jsonb_build_object(
        'anatom_site_general', (ARRAY['head/neck', 'torso', 'upper extremity', 'palms/soles', NULL])[1 + d.class % 5],
        'age_approx', CASE WHEN d.age < 100 THEN d.age END, 'sex', 'female',
        'skin_type', CASE WHEN d.how < 0.4 THEN (ARRAY['I', 'II', 'III', 'IV', 'V', 'VI'])[1 + d.class % 6] END
    )),
    10, '{}', 'dr', 'r', CASE WHEN o.outcome = 'failed' THEN 'integrity' END,
    CASE WHEN o.outcome <> 'failed' THEN jsonb_build_object(
        'outcome', o.outcome,
        'quality', '{"sharpness": 30, "exposure": 0.5, "contrast": 0.2, "dark": 0.01, "bright": 0.02, "colour": 9}'::jsonb,
        'provenance', jsonb_build_object(
            'model_id', CASE WHEN d.at > now() - interval '9 months' THEN 'lite.b' ELSE 'lite.a' END,
            'model_digest', 'd', 'policy_version', '1'
        ),
        'classification', CASE WHEN o.outcome <> 'refused' THEN jsonb_build_object('probabilities', jsonb_build_object(
            'MEL', d.p * 0.4, 'NV', 0.5, 'BCC', 0.1 * (1 - d.p), 'AK', 0.04, 'BKL', 0.1 * d.p, 'DF', 0.02, 'VASC', 0.01,
            'SCC', 0.03, 'UNK', CASE d.class WHEN 1 THEN 0.9 ELSE 0.01 END
        )) END
    ) END,
    CASE WHEN o.outcome IN ('decided', 'review') THEN (ARRAY['low', 'low', 'medium', 'high'])[1 + d.class % 4]::risk_level END,
    CASE WHEN o.outcome IN ('decided', 'review') THEN
        (ARRAY['routine', 'routine', 'expedited', 'urgent'])[1 + d.class % 4]::urgency
    END
FROM drawn AS d
CROSS JOIN LATERAL (
    SELECT CASE WHEN d.how < 0.8 THEN 'decided' WHEN d.how < 0.95 THEN 'review' WHEN d.how < 0.995 THEN 'refused' ELSE 'failed' END
        AS outcome
) AS o;

-- name: queue
-- Have what was written without the triggers counted.
INSERT INTO report_queue (assessment_id) SELECT assessment_id FROM assessments ORDER BY completed_at;

-- name: say
-- Write what clinicians said of every fifth answer, half of them of what they intended before.
INSERT INTO reviews (
    review_id, assessment_id, clinician, request_id, recorded_at, decision, reason, referral_made, intended_referral, before_answer
)
SELECT
    gen_random_uuid(), a.assessment_id, 'dr', 'r', a.completed_at + interval '1 minute', r.decision,
    CASE r.decision WHEN 'override' THEN 'clinical_examination' END, random() < 0.5,
    w.intended, CASE WHEN w.intended IS NOT NULL THEN true END
FROM assessments AS a
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN random() < 0.5 AND a.answer IS NOT NULL THEN
            (ARRAY['none', 'routine', 'expedited', 'urgent'])[1 + (random() * 3)::integer]
    END AS intended
) AS w
CROSS JOIN LATERAL (SELECT CASE WHEN random() < 0.8 OR a.answer IS NULL THEN 'accept' ELSE 'override' END AS decision) AS r
WHERE a.outcome IN ('decided', 'review') AND random() < 0.2;

-- name: turn_out
-- Write what every twelfth lesion turned out to be, some of them twice and otherwise.
INSERT INTO lesion_outcomes
    (outcome_id, lesion_id, kind, diagnosis, malignant, observed_on, source, recorded_by, request_id, recorded_at)
SELECT
    gen_random_uuid(), l.lesion_id, CASE WHEN random() < 0.6 THEN 'histology' ELSE 'follow_up' END,
    (ARRAY['MEL', 'NV', 'NV', 'BCC', 'BKL', 'SCC', 'NV', 'UNK'])[1 + (random() * 7)::integer], NULL,
    current_date - (random() * 700)::integer, 'registry', 'dr', 'r', now() - random() * interval '23 months'
FROM lesions AS l
CROSS JOIN LATERAL generate_series(1, CASE WHEN random() < 0.2 AND l.lesion_id IS NOT NULL THEN 2 ELSE 1 END)
WHERE random() < 0.08;

-- name: recount_words
-- What a month's ($1) record holds, straight from its tables.
SELECT 'outcome' AS tab, a.outcome AS word, count(*) AS n FROM assessments AS a
WHERE a.completed_at >= $1 AND a.completed_at < $1 + interval '1 month' GROUP BY 2
UNION ALL
SELECT 'diagnosis', (
    SELECT p.key FROM jsonb_each_text(a.answer #> '{classification,probabilities}') AS p ORDER BY p.value::real DESC, p.key LIMIT 1
), count(*) FROM assessments AS a
WHERE a.outcome IN ('decided', 'review') AND a.completed_at >= $1 AND a.completed_at < $1 + interval '1 month' GROUP BY 2
UNION ALL
SELECT 'level', a.demand_level::text, count(*) FROM assessments AS a
WHERE a.outcome IN ('decided', 'review') AND a.completed_at >= $1 AND a.completed_at < $1 + interval '1 month' GROUP BY 2
UNION ALL
SELECT 'urgency', a.demand_urgency::text, count(*) FROM assessments AS a
WHERE a.outcome IN ('decided', 'review') AND a.completed_at >= $1 AND a.completed_at < $1 + interval '1 month' GROUP BY 2
UNION ALL
SELECT 'decision', r.decision, count(*) FROM reviews AS r
WHERE r.decision IS NOT NULL AND r.recorded_at >= $1 AND r.recorded_at < $1 + interval '1 month' GROUP BY 2
UNION ALL
SELECT 'result', o.kind, count(*) FROM lesion_outcomes AS o
WHERE o.recorded_at >= $1 AND o.recorded_at < $1 + interval '1 month' GROUP BY 2;

-- name: recount_lesions
-- Each model's lesions up to a month ($1), by its first answer and what became of them, straight from the tables.
SELECT
    f.model_id, f.action, coalesce(t.truth, 'unknown') AS truth, coalesce(f.site, 'unknown') AS site,
    coalesce(CASE
        WHEN f.age < 20 THEN '0-19' WHEN f.age >= 80 THEN '80+'
        ELSE (f.age / 10) || '0-' || (f.age / 10) || '9'
    END, 'unknown') AS age_band, coalesce(f.skin_type, 'unknown') AS skin_type, count(*) AS n
FROM (
    SELECT DISTINCT ON (i.lesion_id, a.answer #>> '{provenance,model_id}')
        i.lesion_id, a.answer #>> '{provenance,model_id}' AS model_id, a.created_at, a.completed_at,
        CASE WHEN a.demand_level = 'high' OR a.demand_urgency = 'urgent' THEN 'refer' ELSE 'not' END AS action,
        a.context ->> 'anatom_site_general' AS site, (a.context ->> 'age_approx')::integer AS age,
        a.context ->> 'skin_type' AS skin_type
    FROM assessments AS a
    INNER JOIN lesion_images AS i USING (image_id)
    WHERE a.outcome IN ('decided', 'review')
    ORDER BY i.lesion_id, a.answer #>> '{provenance,model_id}', a.created_at, a.assessment_id
) AS f
LEFT JOIN LATERAL (
    SELECT CASE
        WHEN o.diagnosis = 'MEL' THEN 'melanoma' WHEN o.diagnosis IN ('BCC', 'SCC', 'AK') THEN 'other_malignant' ELSE 'benign'
    END AS truth
    FROM lesion_outcomes AS o
    WHERE o.lesion_id = f.lesion_id AND o.diagnosis <> 'UNK' AND o.observed_on >= (f.created_at AT TIME ZONE 'UTC')::date - 1
    ORDER BY o.kind = 'histology' DESC, o.observed_on DESC, o.recorded_at DESC, o.outcome_id DESC
    LIMIT 1
) AS t ON true
WHERE f.completed_at < $1::timestamptz + interval '1 month'
GROUP BY 1, 2, 3, 4, 5, 6;

-- name: pending
-- Make so many ($1) answered assessments pending, without their message.
UPDATE assessments SET outcome = 'pending', answer = NULL, completed_at = NULL
WHERE assessment_id IN (SELECT assessment_id FROM assessments WHERE outcome = 'decided' LIMIT $1);

-- name: end
-- End them, and say what each trigger costs.
EXPLAIN (ANALYZE, FORMAT JSON) UPDATE assessments SET outcome = 'failed', failure = 'benchmark', completed_at = now()
WHERE outcome = 'pending';
