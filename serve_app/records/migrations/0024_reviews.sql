-- The clinician's word on an answer, what the lesion turned out to be, and messages to the PMS of both.

CREATE TABLE reviews (
    review_id uuid PRIMARY KEY,
    assessment_id uuid NOT NULL REFERENCES assessments,
    clinician text NOT NULL CHECK (clinician <> ''),
    request_id text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    decision text CHECK (decision IN ('accept', 'override')),
    reason text CHECK (reason <> ''),
    diagnosis text CHECK (diagnosis <> ''),
    level risk_level,
    urgency urgency,
    referral_made boolean,
    follow_up_by date,
    note text CHECK (char_length(note) BETWEEN 1 AND 1000),
    impression_diagnosis text CHECK (impression_diagnosis <> ''),
    intended_referral text CHECK (intended_referral IN ('none', 'routine', 'expedited', 'urgent')),
    before_answer boolean,
    -- The assessments whose demand it closed.
    answers uuid[] NOT NULL DEFAULT '{}',
    salt uuid NOT NULL DEFAULT gen_random_uuid(),
    CONSTRAINT reviews_say_something CHECK (decision IS NOT NULL OR before_answer IS NOT NULL),
    CONSTRAINT reviews_override CHECK ((decision = 'override') IS TRUE = (reason IS NOT NULL)),
    CONSTRAINT reviews_impression
    CHECK ((before_answer IS NOT NULL) = (impression_diagnosis IS NOT NULL OR intended_referral IS NOT NULL)),
    CONSTRAINT reviews_decide CHECK (
        decision IS NOT NULL
        OR num_nonnulls(diagnosis, level, urgency, referral_made, follow_up_by, note) = 0 AND answers = '{}'
    )
);
CREATE INDEX reviews_of_assessment ON reviews (assessment_id, recorded_at);
CREATE INDEX reviews_follow_up ON reviews (follow_up_by) WHERE follow_up_by IS NOT NULL;
COMMENT ON TABLE reviews IS
'What clinicians said of assessments: their own impression, and what they decided; added to, never changed but for the note, which goes with the image.';
COMMENT ON COLUMN reviews.before_answer IS
'Of an impression: whether it came before the answer was given to this clinician.';
COMMENT ON COLUMN reviews.salt IS 'Random; in the digest of the row that the audit log holds.';

CREATE TABLE lesion_outcomes (
    outcome_id uuid PRIMARY KEY,
    lesion_id uuid NOT NULL REFERENCES lesions,
    image_id uuid REFERENCES lesion_images,
    kind text NOT NULL CHECK (kind IN ('histology', 'follow_up')),
    diagnosis text CHECK (diagnosis <> ''),
    malignant boolean,
    code text CHECK (char_length(code) BETWEEN 1 AND 100),
    code_system text CHECK (char_length(code_system) BETWEEN 1 AND 200),
    observed_on date NOT NULL,
    source text NOT NULL CHECK (source <> ''),
    recorded_by text NOT NULL CHECK (recorded_by <> ''),
    request_id text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    salt uuid NOT NULL DEFAULT gen_random_uuid(),
    CONSTRAINT lesion_outcomes_say_something CHECK (diagnosis IS NOT NULL OR malignant IS NOT NULL),
    CHECK ((code IS NULL) = (code_system IS NULL))
);
CREATE INDEX lesion_outcomes_of_lesion ON lesion_outcomes (lesion_id, recorded_at);
COMMENT ON TABLE lesion_outcomes IS
'What lesions turned out to be, by histology or follow-up; later rows add, and none is changed.';
COMMENT ON COLUMN lesion_outcomes.salt IS 'Random; in the digest of the row that the audit log holds.';

-- A message is of one kind; only of an assessment is there one alone, which is due again when its image is erased.
ALTER TABLE outbox ADD COLUMN kind text NOT NULL DEFAULT 'assessment'
CHECK (kind IN ('assessment', 'review', 'outcome', 'fhir', 'report'));
ALTER TABLE outbox ADD COLUMN subject_id uuid;
ALTER TABLE outbox ALTER COLUMN assessment_id DROP NOT NULL;
ALTER TABLE outbox ALTER COLUMN encounter_id DROP NOT NULL;
ALTER TABLE outbox DROP CONSTRAINT outbox_assessment_id_key;
CREATE UNIQUE INDEX outbox_of_assessment ON outbox (assessment_id) WHERE kind = 'assessment';
CREATE INDEX outbox_of_any_assessment ON outbox (assessment_id);
-- Reports, which have no encounter, keep an order of their own.
DROP INDEX outbox_waiting;
CREATE INDEX outbox_waiting ON outbox (coalesce(encounter_id, ''), position)
WHERE delivered_at IS NULL AND dead_at IS NULL;
ALTER TABLE outbox ADD CONSTRAINT outbox_about CHECK (
    CASE kind
        WHEN 'report' THEN assessment_id IS NULL AND encounter_id IS NULL AND subject_id IS NOT NULL
        ELSE assessment_id IS NOT NULL AND encounter_id IS NOT NULL AND (subject_id IS NULL) = (kind IN ('assessment', 'fhir'))
    END
);
COMMENT ON COLUMN outbox.subject_id IS 'The review, the outcome or the report that is told; null where it is the assessment.';
