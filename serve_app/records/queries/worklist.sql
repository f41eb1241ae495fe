-- name: worklist
-- List what waits for somebody in a principal's own care, by due day, from behind a cursor on; days are UTC's.
WITH care AS (
    -- An assignment goes before an emergency access; of several of those, the one that ends last.
    SELECT
        patient_id,
        CASE WHEN bool_and(emergency IS NOT NULL) THEN (array_agg(emergency ORDER BY ends_at DESC))[1] END AS emergency
    FROM (
        SELECT patient_id, NULL::uuid AS emergency, NULL::timestamptz AS ends_at
        FROM care_assignments
        WHERE clinician = :principal AND starts_at <= now() AND (ends_at IS NULL OR ends_at > now())
        UNION ALL
        SELECT patient_id, emergency_id, ends_at
        FROM emergency_accesses
        WHERE principal = :principal AND starts_at <= now() AND ends_at > now() AND ended_at IS NULL
    ) AS reached
    GROUP BY patient_id
),
images AS MATERIALIZED (
    SELECT
        c.patient_id, c.emergency, l.head, i.lesion_id, i.image_id, i.created_at, a.assessment_id, a.outcome,
        a.demand_level AS level, a.demand_urgency AS urgency,
        a.demand_level IS NOT NULL AND a.demand_answered_at IS NULL AS demands,
        -- Of what is in doubt, or has no answer, nobody knows that it is less than urgent.
        (i.created_at AT TIME ZONE 'UTC')::date + CASE
            WHEN a.demand_urgency = 'urgent' OR a.outcome NOT IN ('decided', 'erased') THEN :urgent::integer
            WHEN a.demand_urgency = 'expedited' THEN :expedited::integer
            ELSE :routine::integer
        END AS due,
        max(i.created_at) FILTER (WHERE i.erased_at IS NULL) OVER (PARTITION BY l.head) AS newest
    FROM care AS c
    INNER JOIN lesion_heads AS l USING (patient_id)
    INNER JOIN lesion_images AS i USING (lesion_id)
    INNER JOIN assessments AS a USING (image_id)
),
demands AS (
    -- As `open_demand` has them, a lesion each, where those that are linked are one; due when the first of its images is, which
    -- no later one puts off.
    SELECT DISTINCT ON (head)
        patient_id, emergency, lesion_id, image_id, assessment_id, outcome,
        max(level) OVER lesion AS level, max(urgency) OVER lesion AS urgency, created_at AS since, min(due) OVER lesion AS due
    FROM images
    WHERE demands AND 'demand' = ANY(:kinds::text[])
    WINDOW lesion AS (PARTITION BY head)
    ORDER BY head, images.level DESC, images.urgency DESC, created_at, image_id
),
follow_ups AS (
    SELECT
        i.patient_id, i.emergency, i.lesion_id, i.image_id, i.assessment_id, i.outcome, f.level, f.urgency,
        f.recorded_at AS since, f.follow_up_by AS due
    FROM (:follow_ups) AS f
    INNER JOIN images AS i USING (assessment_id)
    WHERE 'follow_up' = ANY(:kinds) AND f.follow_up_by <= (now() AT TIME ZONE 'UTC')::date + :notice::integer
),
work AS (
    SELECT 'demand' AS kind, * FROM demands
    UNION ALL
    SELECT 'follow_up', * FROM follow_ups
    UNION ALL
    -- In doubt, or without an answer. An image that a demand is listed by is not listed again; one that can have no
    -- answer is done with by a later image of the lesion, a decision or the lesion's outcome.
    SELECT i.outcome, i.patient_id, i.emergency, i.lesion_id, i.image_id, i.assessment_id, i.outcome, i.level, i.urgency,
        i.created_at, i.due
    FROM images AS i
    WHERE i.outcome = ANY(:kinds)
        AND CASE i.outcome
            WHEN 'pending' THEN true
            WHEN 'review' THEN i.demands AND NOT EXISTS (SELECT FROM demands AS d WHERE d.image_id = i.image_id)
            ELSE i.level IS NULL
                AND i.created_at = i.newest
                AND NOT EXISTS (SELECT FROM reviews AS r WHERE r.assessment_id = i.assessment_id AND r.decision IS NOT NULL)
                AND NOT EXISTS (
                    SELECT FROM lesion_outcomes AS o
                    WHERE o.lesion_id = ANY(same_lesions(i.lesion_id))
                        AND o.recorded_at > i.created_at
                        AND o.observed_on >= (i.created_at AT TIME ZONE 'UTC')::date
                )
        END
),
ranked AS (
    SELECT
        *, due < (now() AT TIME ZONE 'UTC')::date AS overdue,
        CASE level WHEN 'low' THEN 2 WHEN 'medium' THEN 1 ELSE 0 END AS rank
    FROM work
)
SELECT kind, patient_id, emergency, lesion_id, image_id, assessment_id, outcome, level::text, urgency::text, since, due, overdue, rank
FROM ranked
WHERE :due::date IS NULL
    OR (due, rank, since, kind, image_id) > (:due, :rank::integer, :since::timestamptz, :kind::text, :image_id::uuid)
ORDER BY due, rank, since, kind, image_id
LIMIT :limit::integer;
