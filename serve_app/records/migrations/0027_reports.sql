-- What reports count: one narrow row an assessment, the counts made of these rows, and the reports as they were made.

CREATE TABLE report_queue (
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    assessment_id uuid,
    review_id uuid,
    outcome_id uuid,
    CHECK (num_nonnulls(assessment_id, review_id, outcome_id) = 1)
);
COMMENT ON TABLE report_queue IS
'What is still to be counted: written with the assessment, the review or the outcome, in its transaction, and taken out where it is counted.';

CREATE TABLE assessment_facts (
    -- Given while nobody else counts: whoever has read up to one has seen all before it.
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    assessment_id uuid NOT NULL UNIQUE,
    created_on date NOT NULL,
    completed_on date NOT NULL,
    outcome text NOT NULL,
    model_id text,
    model_digest text,
    policy_version text,
    level risk_level,
    urgency urgency,
    diagnosis text,
    p_melanoma real,
    p_malignant real,
    p_unknown real,
    confidence real,
    sharpness real,
    exposure real,
    contrast real,
    dark real,
    bright real,
    colour real,
    site text,
    age_band text,
    sex text,
    skin_type text,
    device text,
    seconds real,
    is_index boolean NOT NULL,
    intended text,
    referral_made boolean,
    truth text CHECK (truth IN ('melanoma', 'other_malignant', 'benign'))
);
COMMENT ON TABLE assessment_facts IS
'What reports and drift know of each assessment that has ended: no patient, no text, no vector, days instead of times; blank once the image is erased.';
COMMENT ON COLUMN assessment_facts.diagnosis IS 'The most probable of the nine; `confidence` is its probability.';
COMMENT ON COLUMN assessment_facts.seconds IS 'From the upload to the answer.';
COMMENT ON COLUMN assessment_facts.is_index IS
'The first answer of this model to its lesion: lesions are counted, not images.';
COMMENT ON COLUMN assessment_facts.intended IS
'The referral that the clinician intended before seeing the answer; `referral_made` is the last word on whether it was.';
COMMENT ON COLUMN assessment_facts.truth IS
'What the lesion turned out to be on the day of the image or later: the newest histology, else the newest follow-up; null for unknown.';

CREATE TABLE report_cells (
    tab text NOT NULL,
    month date NOT NULL CHECK (extract(day FROM month) = 1),
    key text [] NOT NULL,
    n bigint NOT NULL,
    PRIMARY KEY (tab, month, key)
);
COMMENT ON TABLE report_cells IS
'Counts that reports are made of, by month (UTC); what was counted stays when the image is erased.';

CREATE TABLE report_snapshots (
    report_id uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('summary', 'performance', 'drift')),
    period text NOT NULL CHECK (period <> ''),
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    document jsonb NOT NULL,
    UNIQUE (kind, period)
);
COMMENT ON TABLE report_snapshots IS
'Reports as they were published: one of each kind and period, added to and never changed, since the difference of two could tell what each hides.';

CREATE UNIQUE INDEX outbox_of_report ON outbox (subject_id) WHERE kind = 'report';
CREATE TRIGGER report_snapshots_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON report_snapshots
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE FUNCTION facts_on_record(of_lesions uuid []) RETURNS SETOF assessment_facts
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT
        NULL::bigint,
        a.assessment_id,
        (a.created_at AT TIME ZONE 'UTC')::date,
        (a.completed_at AT TIME ZONE 'UTC')::date,
        a.outcome,
        m.model_id,
        a.answer #>> '{provenance,model_digest}',
        a.answer #>> '{provenance,policy_version}',
        a.demand_level,
        a.demand_urgency,
        p.diagnosis,
        p.melanoma,
        p.malignant,
        p.unknown,
        p.confidence,
        (q.quality ->> 'sharpness')::real,
        (q.quality ->> 'exposure')::real,
        (q.quality ->> 'contrast')::real,
        (q.quality ->> 'dark')::real,
        (q.quality ->> 'bright')::real,
        (q.quality ->> 'colour')::real,
        a.context ->> 'anatom_site_general',
        CASE
            WHEN g.age < 20 THEN '0-19'
            WHEN g.age >= 80 THEN '80+'
            ELSE (g.age / 10 * 10)::text || '-' || (g.age / 10 * 10 + 9)::text
        END,
        a.context ->> 'sex',
        a.context ->> 'skin_type',
        a.context ->> 'device',
        extract(epoch FROM a.completed_at - a.created_at)::real,
        m.model_id IS NOT NULL AND a.outcome <> 'refused'
        AND row_number() OVER (
            PARTITION BY i.lesion_id, m.model_id, a.outcome = 'refused' ORDER BY a.created_at, a.assessment_id
        ) = 1
        AND NOT EXISTS (
            SELECT FROM lesion_images AS gone
            INNER JOIN assessments AS erased ON erased.image_id = gone.image_id AND erased.outcome = 'erased'
            INNER JOIN assessment_facts AS f ON f.assessment_id = erased.assessment_id
            WHERE gone.lesion_id = i.lesion_id AND f.is_index AND f.model_id = m.model_id
        ),
        (
            SELECT r.intended_referral FROM reviews AS r
            WHERE r.assessment_id = a.assessment_id AND r.before_answer AND r.intended_referral IS NOT NULL
            ORDER BY r.recorded_at, r.review_id
            LIMIT 1
        ),
        (
            SELECT r.referral_made FROM reviews AS r
            WHERE r.assessment_id = a.assessment_id AND r.referral_made IS NOT NULL
            ORDER BY r.recorded_at DESC, r.review_id DESC
            LIMIT 1
        ),
        (
            SELECT
                CASE
                    WHEN NOT coalesce(o.malignant, o.diagnosis IN ('MEL', 'BCC', 'SCC', 'AK')) THEN 'benign'
                    WHEN o.diagnosis = 'MEL' THEN 'melanoma'
                    ELSE 'other_malignant'
                END
            FROM lesion_outcomes AS o
            WHERE o.lesion_id = i.lesion_id
                AND (o.malignant IS NOT NULL OR o.diagnosis <> 'UNK')
                -- A day's grace: theirs is the calendar of the place.
                AND o.observed_on >= (a.created_at AT TIME ZONE 'UTC')::date - 1
            ORDER BY o.kind = 'histology' DESC, o.observed_on DESC, o.recorded_at DESC, o.outcome_id DESC
            LIMIT 1
        )
    FROM lesion_images AS i
    INNER JOIN assessments AS a USING (image_id)
    CROSS JOIN LATERAL (SELECT a.answer #>> '{provenance,model_id}' AS model_id) AS m
    CROSS JOIN LATERAL (SELECT a.answer -> 'quality' AS quality) AS q
    CROSS JOIN LATERAL (SELECT (a.context ->> 'age_approx')::integer AS age) AS g
    CROSS JOIN LATERAL (
        SELECT
            (array_agg(each.key ORDER BY each.value::real DESC, each.key))[1] AS diagnosis,
            max(each.value::real) AS confidence,
            sum(each.value::real) FILTER (WHERE each.key = 'MEL') AS melanoma,
            sum(each.value::real) FILTER (WHERE each.key IN ('MEL', 'BCC', 'SCC', 'AK')) AS malignant,
            sum(each.value::real) FILTER (WHERE each.key = 'UNK') AS unknown
        FROM jsonb_each_text(a.answer #> '{classification,probabilities}') AS each
    ) AS p
    WHERE i.lesion_id = ANY(of_lesions) AND a.outcome NOT IN ('pending', 'erased')
    ORDER BY a.completed_at, a.assessment_id;
END;
COMMENT ON FUNCTION facts_on_record IS
'What the record says now of the assessments of lesions that have ended, in that order; of erased ones nothing.';

CREATE FUNCTION cells_of(f assessment_facts) RETURNS TABLE (tab text, month date, key text [])
LANGUAGE sql IMMUTABLE
BEGIN ATOMIC
    SELECT c.tab, (f).completed_on - extract(day FROM (f).completed_on)::integer + 1, c.key
    FROM (
        -- Of a lesion: whether the policy refers it (docs/reports.md), what became of it, and what was intended before.
        SELECT
            CASE WHEN (f).level = 'high' OR (f).urgency = 'urgent' THEN 'refer' ELSE 'not' END AS action,
            coalesce((f).truth, 'unknown') AS truth
    ) AS w
    CROSS JOIN LATERAL (
        VALUES
        ('outcome', ARRAY[(f).outcome], true),
        ('diagnosis', ARRAY[(f).diagnosis], (f).diagnosis IS NOT NULL),
        ('level', ARRAY[(f).level::text], (f).diagnosis IS NOT NULL),
        ('urgency', ARRAY[(f).urgency::text], (f).diagnosis IS NOT NULL),
        (
            'seconds',
            ARRAY[width_bucket(
                (f).seconds::float8, ARRAY[0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 300, 3600]::float8 []
            )::text],
            (f).outcome IN ('decided', 'review', 'refused')
        ),
        ('site', ARRAY[(f).model_id, w.action, w.truth, coalesce((f).site, 'unknown')], (f).is_index),
        ('age_band', ARRAY[(f).model_id, w.action, w.truth, coalesce((f).age_band, 'unknown')], (f).is_index),
        ('skin_type', ARRAY[(f).model_id, w.action, w.truth, coalesce((f).skin_type, 'unknown')], (f).is_index),
        (
            'intended',
            ARRAY[
                (f).model_id, (f).intended, (f).level::text, coalesce((f).referral_made::text, 'unknown'),
                w.action, w.truth
            ],
            (f).is_index AND (f).intended IS NOT NULL
        )
    ) AS c (tab, key, counts)
    WHERE c.counts;
END;
COMMENT ON FUNCTION cells_of IS 'In which cells of the reports an assessment counts.';

CREATE FUNCTION count_lesions(of_lesions uuid []) RETURNS void
LANGUAGE sql
-- As text: pg_dump 18 writes a parsed body with two ON CONFLICT in a way that cannot be read back.
AS $$
    WITH fresh AS MATERIALIZED (SELECT * FROM facts_on_record(of_lesions)),
    counted AS MATERIALIZED (
        SELECT f.* FROM assessment_facts AS f INNER JOIN fresh USING (assessment_id)
    ),
    written AS (
        INSERT INTO assessment_facts AS f (
            assessment_id, created_on, completed_on, outcome, model_id, model_digest, policy_version, level, urgency,
            diagnosis, p_melanoma, p_malignant, p_unknown, confidence, sharpness, exposure, contrast, dark, bright,
            colour, site, age_band, sex, skin_type, device, seconds, is_index, intended, referral_made, truth
        )
        SELECT
            n.assessment_id, n.created_on, n.completed_on, n.outcome, n.model_id, n.model_digest, n.policy_version, n.level,
            n.urgency, n.diagnosis, n.p_melanoma, n.p_malignant, n.p_unknown, n.confidence, n.sharpness, n.exposure,
            n.contrast, n.dark, n.bright, n.colour, n.site, n.age_band, n.sex, n.skin_type, n.device, n.seconds,
            n.is_index, n.intended, n.referral_made, n.truth
        FROM fresh AS n
        ON CONFLICT (assessment_id) DO UPDATE
        SET is_index = excluded.is_index, intended = excluded.intended, referral_made = excluded.referral_made,
            truth = excluded.truth
        WHERE (f.is_index, f.intended, f.referral_made, f.truth)
            IS DISTINCT FROM (excluded.is_index, excluded.intended, excluded.referral_made, excluded.truth)
    )
    INSERT INTO report_cells AS c (tab, month, key, n)
    SELECT each.tab, each.month, each.key, sum(each.n)
    FROM (
        SELECT k.tab, k.month, k.key, 1 AS n FROM fresh AS f CROSS JOIN LATERAL cells_of(f) AS k
        UNION ALL
        SELECT k.tab, k.month, k.key, -1 FROM counted AS f CROSS JOIN LATERAL cells_of(f) AS k
    ) AS each
    GROUP BY each.tab, each.month, each.key
    HAVING sum(each.n) <> 0
    ORDER BY each.tab, each.month, each.key
    ON CONFLICT (tab, month, key) DO UPDATE SET n = c.n + excluded.n;
$$;
COMMENT ON FUNCTION count_lesions IS
'Bring facts and counts of lesions to what the record says; whoever calls it holds the counters'' lock.';

CREATE FUNCTION count_reports(at_most integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    taken report_queue [];
    lesions uuid [];
BEGIN
    -- One counter at a time ("dermfold" in ASCII); an erasure waits for it, too. What is read next is newer than the lock.
    PERFORM pg_advisory_xact_lock(7234314190636149860);
    WITH gone AS (
        DELETE FROM report_queue
        WHERE position IN (SELECT q.position FROM report_queue AS q ORDER BY q.position LIMIT at_most)
        RETURNING *
    )
    SELECT array_agg(g::report_queue) INTO taken FROM gone AS g;
    IF taken IS NULL THEN
        RETURN 0;
    END IF;
    SELECT array_agg(DISTINCT found.lesion_id) INTO lesions
    FROM (
        SELECT i.lesion_id
        FROM unnest(taken) AS t
        LEFT JOIN reviews AS r ON r.review_id = t.review_id
        INNER JOIN assessments AS a ON a.assessment_id = coalesce(t.assessment_id, r.assessment_id)
        INNER JOIN lesion_images AS i ON i.image_id = a.image_id
        UNION ALL
        SELECT o.lesion_id FROM unnest(taken) AS t INNER JOIN lesion_outcomes AS o ON o.outcome_id = t.outcome_id
    ) AS found;
    PERFORM count_lesions(lesions);
    -- Words and outcomes are never changed: each counts once, in the month that it was recorded in.
    INSERT INTO report_cells AS c (tab, month, key, n)
    SELECT said.tab, date_trunc('month', said.recorded_at AT TIME ZONE 'UTC')::date, said.key, count(*)
    FROM (
        SELECT 'decision' AS tab, r.recorded_at, ARRAY[r.decision, coalesce(r.reason, '')] AS key
        FROM unnest(taken) AS t
        INNER JOIN reviews AS r ON r.review_id = t.review_id
        WHERE r.decision IS NOT NULL
        UNION ALL
        SELECT 'result', o.recorded_at, ARRAY[
            o.kind,
            CASE
                WHEN NOT coalesce(o.malignant, o.diagnosis IN ('MEL', 'BCC', 'SCC', 'AK')) AND (
                    o.malignant IS NOT NULL OR o.diagnosis <> 'UNK'
                ) THEN 'benign'
                WHEN o.diagnosis = 'MEL' THEN 'melanoma'
                WHEN coalesce(o.malignant, o.diagnosis IN ('BCC', 'SCC', 'AK')) THEN 'other_malignant'
                ELSE 'unknown'
            END
        ]
        FROM unnest(taken) AS t
        INNER JOIN lesion_outcomes AS o ON o.outcome_id = t.outcome_id
    ) AS said
    GROUP BY 1, 2, 3
    ORDER BY 1, 2, 3
    ON CONFLICT (tab, month, key) DO UPDATE SET n = c.n + excluded.n;
    RETURN cardinality(taken);
END;
$$;
COMMENT ON FUNCTION count_reports IS
'Count what came in since, up to so many entries of the queue; returns how many. Any number may call it at once.';

CREATE FUNCTION queue_for_reports() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    IF TG_TABLE_NAME = 'assessments' THEN
        INSERT INTO report_queue (assessment_id) VALUES (NEW.assessment_id);
    ELSIF TG_TABLE_NAME = 'reviews' THEN
        INSERT INTO report_queue (review_id) VALUES (NEW.review_id);
    ELSE
        INSERT INTO report_queue (outcome_id) VALUES (NEW.outcome_id);
    END IF;
    RETURN NULL;
END;
$$;
CREATE TRIGGER assessments_counted AFTER UPDATE OF outcome ON assessments
FOR EACH ROW WHEN (OLD.outcome = 'pending' AND NEW.outcome <> 'pending') EXECUTE FUNCTION queue_for_reports();
CREATE TRIGGER reviews_counted AFTER INSERT ON reviews FOR EACH ROW EXECUTE FUNCTION queue_for_reports();
CREATE TRIGGER lesion_outcomes_counted AFTER INSERT ON lesion_outcomes
FOR EACH ROW EXECUTE FUNCTION queue_for_reports();

-- An answer that is about to be erased is counted first; then nothing of it is left but that it was.
CREATE FUNCTION settle_facts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7234314190636149860);
    PERFORM count_lesions(ARRAY(SELECT i.lesion_id FROM lesion_images AS i WHERE i.image_id = OLD.image_id));
    UPDATE assessment_facts
    SET outcome = 'erased', model_digest = NULL, policy_version = NULL, level = NULL, urgency = NULL, diagnosis = NULL,
        p_melanoma = NULL, p_malignant = NULL, p_unknown = NULL, confidence = NULL, sharpness = NULL, exposure = NULL,
        contrast = NULL, dark = NULL, bright = NULL, colour = NULL, site = NULL, age_band = NULL, sex = NULL,
        skin_type = NULL, device = NULL, seconds = NULL, intended = NULL, referral_made = NULL, truth = NULL
    WHERE assessment_id = OLD.assessment_id;
    RETURN NEW;
END;
$$;
CREATE TRIGGER assessments_settled BEFORE UPDATE OF outcome ON assessments
FOR EACH ROW WHEN (NEW.outcome = 'erased' AND OLD.outcome NOT IN ('erased', 'pending')) EXECUTE FUNCTION settle_facts();

REVOKE EXECUTE ON FUNCTION count_reports, queue_for_reports, settle_facts FROM PUBLIC;

-- What is there already is counted by the service, in the background.
INSERT INTO report_queue (assessment_id)
SELECT assessment_id FROM assessments WHERE outcome NOT IN ('pending', 'erased') ORDER BY completed_at;
INSERT INTO report_queue (review_id) SELECT review_id FROM reviews ORDER BY recorded_at;
INSERT INTO report_queue (outcome_id) SELECT outcome_id FROM lesion_outcomes ORDER BY recorded_at;
