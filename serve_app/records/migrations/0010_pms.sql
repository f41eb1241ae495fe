-- The patient management system: what it says of patients, and what it is still to be told.

CREATE TABLE patient_records (
    patient_id text PRIMARY KEY CHECK (patient_id <> ''),
    birth_date date,
    sex text CHECK (sex IN ('female', 'male', 'other', 'unknown')),
    personal_melanoma boolean,
    personal_skin_cancer boolean,
    family_melanoma boolean,
    immunosuppression boolean,
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE patient_records IS
'The directory of patients where no PMS can be asked: loaded by `derm-cds patients load`, read at every upload.';

CREATE TABLE patient_encounters (
    encounter_id text PRIMARY KEY CHECK (encounter_id <> ''),
    patient_id text NOT NULL REFERENCES patient_records ON DELETE CASCADE
);
COMMENT ON TABLE patient_encounters IS
'Whose encounter is whose, for the same directory.';

CREATE TABLE outbox (
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id uuid NOT NULL UNIQUE,
    -- One message an assessment, whoever completes it.
    assessment_id uuid NOT NULL UNIQUE REFERENCES assessments,
    encounter_id text NOT NULL CHECK (encounter_id <> ''),
    queued_at timestamptz NOT NULL DEFAULT now(),
    waiting_since timestamptz NOT NULL DEFAULT now(),
    attempts integer NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz,
    last_error text,
    delivered_at timestamptz,
    dead_at timestamptz,
    CHECK (delivered_at IS NULL OR dead_at IS NULL)
);
CREATE INDEX outbox_waiting ON outbox (encounter_id, position)
WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX outbox_due ON outbox (due_at)
WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX outbox_dead ON outbox (position)
WHERE dead_at IS NOT NULL;
COMMENT ON TABLE outbox IS
'Assessments that the PMS is to be told of: written with the assessment, in its transaction; holds no finding itself.';
COMMENT ON COLUMN outbox.message_id IS
'The Idempotency-Key of every attempt.';
COMMENT ON COLUMN outbox.waiting_since IS
'From when its time to be delivered counts: when it was queued, or last sent again by an operator.';
COMMENT ON COLUMN outbox.dead_at IS
'When it was given up: nothing is sent again unless an operator says so (`derm-cds outbox retry`).';
