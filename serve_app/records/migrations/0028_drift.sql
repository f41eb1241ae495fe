-- Drift: what a site's first images gave, what its newest give, and the alarms that the two differ.

-- The loop that looks reads the newest answers.
CREATE INDEX assessments_answered ON assessments (completed_at) WHERE answer IS NOT NULL;

CREATE VIEW answered_images WITH (security_invoker) AS
SELECT
    a.completed_at, i.patient_id, a.outcome, a.answer #>> '{risk,level}' AS level, a.answer -> 'quality' AS quality,
    a.answer #> '{classification,probabilities}' AS probabilities, e.embedding, a.answer -> 'provenance' AS provenance,
    array_remove(ARRAY[
        'answers',
        CASE WHEN a.answer #>> '{quality,red}' IS NOT NULL THEN 'pictures' END,
        CASE WHEN e.embedding IS NOT NULL THEN 'model' END
    ], NULL) AS streams
FROM assessments AS a
INNER JOIN lesion_images AS i USING (image_id)
LEFT JOIN lesion_embeddings AS e
    ON e.image_id = a.image_id AND e.embedding_space = a.answer #>> '{provenance,embedding_space}'
WHERE a.answer IS NOT NULL;
COMMENT ON VIEW answered_images IS
'What drift is measured on, read and kept of no image: in which streams one is depends on what was measured of it.';

CREATE TABLE drift_streams (
    drift_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stream text NOT NULL CHECK (stream IN ('pictures', 'model', 'answers')),
    subject jsonb NOT NULL,
    since timestamptz NOT NULL,
    begun_by text CHECK (begun_by <> ''),
    collected integer NOT NULL DEFAULT 0 CHECK (collected >= 0),
    baseline jsonb,
    baseline_until timestamptz,
    newest jsonb,
    seen_until timestamptz,
    looked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((baseline IS NULL) = (baseline_until IS NULL)),
    CHECK (newest IS NULL OR baseline IS NOT NULL)
);
CREATE INDEX drift_streams_newest ON drift_streams (stream, looked_at);
COMMENT ON TABLE drift_streams IS
'What is held against what: means of at least 300 images and their spread, never of one image or patient. Of each stream the one that was looked at last is current.';
COMMENT ON COLUMN drift_streams.subject IS
'The fields of the answers'' provenance that the baseline depends on: with another value, another baseline begins.';
COMMENT ON COLUMN drift_streams.begun_by IS
'Who had a new baseline begin; null where it began with its subject.';
COMMENT ON COLUMN drift_streams.baseline IS
'By measure, of the first 500 images; never changed. What an image that is erased later gave to it stays in it.';

CREATE TRIGGER drift_streams_frozen BEFORE UPDATE ON drift_streams
FOR EACH ROW WHEN (OLD.baseline IS NOT NULL AND (NEW.baseline, NEW.baseline_until) IS DISTINCT FROM (OLD.baseline, OLD.baseline_until))
EXECUTE FUNCTION refuse_change();

CREATE TABLE drift_alarms (
    alarm_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    drift_id bigint NOT NULL REFERENCES drift_streams,
    measure text NOT NULL CHECK (measure <> ''),
    distance real NOT NULL,
    raised_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    acknowledged_at timestamptz,
    acknowledged_by text CHECK (acknowledged_by <> ''),
    reason text CHECK (reason IN ('new_device', 'new_light', 'other_patients', 'put_right', 'other')),
    ended_at timestamptz,
    CHECK (num_nonnulls(acknowledged_at, acknowledged_by, reason) IN (0, 3)),
    CONSTRAINT drift_alarms_stand_until_acknowledged CHECK (ended_at IS NULL OR acknowledged_at IS NOT NULL)
);
CREATE UNIQUE INDEX drift_alarms_open ON drift_alarms (drift_id, measure) WHERE ended_at IS NULL;
COMMENT ON TABLE drift_alarms IS
'A measure whose newest images differ from the first: raised by the service, acknowledged by an operator, and ended once acknowledged and no longer so.';
