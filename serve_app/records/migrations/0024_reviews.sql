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
    note_salt uuid,
    impression_diagnosis text CHECK (impression_diagnosis <> ''),
    intended_referral text CHECK (intended_referral IN ('none', 'routine', 'expedited', 'urgent')),
    before_answer boolean,
    -- The assessments whose demand it closed.
    answers uuid[] NOT NULL DEFAULT '{}',
    salt uuid NOT NULL DEFAULT gen_random_uuid(),
    CONSTRAINT reviews_note_salted CHECK ((note IS NULL) = (note_salt IS NULL)),
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
COMMENT ON COLUMN reviews.note_salt IS
'Random; in the digest of the note, and gone with it: nobody guesses then what it said.';

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

-- One refusal for every table to which rows are only added.
ALTER FUNCTION refuse_erasure_change RENAME TO refuse_change;
DROP TRIGGER site_operating_points_append_only ON site_operating_points;
DROP FUNCTION refuse_operating_point_change;
CREATE TRIGGER site_operating_points_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON site_operating_points
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER lesion_outcomes_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON lesion_outcomes
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER reviews_append_only BEFORE DELETE OR TRUNCATE ON reviews
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER reviews_unchanged BEFORE UPDATE ON reviews
FOR EACH ROW WHEN (
    NEW.note IS NOT NULL OR (to_jsonb(NEW) - '{note,note_salt}'::text []) IS DISTINCT FROM (to_jsonb(OLD) - '{note,note_salt}'::text [])
)
EXECUTE FUNCTION refuse_change();

-- What an image demanded is answered, and never changed: not by the service's own role either.
CREATE TRIGGER assessments_keep_demand BEFORE UPDATE OF demand_level, demand_urgency ON assessments
FOR EACH ROW WHEN (
    OLD.demand_level IS NOT NULL
    AND (NEW.demand_level, NEW.demand_urgency) IS DISTINCT FROM (OLD.demand_level, OLD.demand_urgency)
)
EXECUTE FUNCTION refuse_change();

CREATE OR REPLACE FUNCTION erase_image(
    of_lesion uuid, of_image uuid, receipt uuid, for_reason text, with_note text, by_actor text, in_request text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    image lesion_images;
BEGIN
    -- Against a hold that is being set ("dermhold" in ASCII): the one that comes second sees the other.
    PERFORM pg_advisory_xact_lock_shared(7234314190669704292);
    SELECT * INTO image FROM lesion_images AS i
    WHERE i.lesion_id = of_lesion AND i.image_id = of_image
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'absent';
    ELSIF image.erased_at IS NOT NULL THEN
        RETURN 'erased';
    ELSIF is_held(image) THEN
        RETURN 'held';
    END IF;

    INSERT INTO erasures
        (receipt_id, image_id, data_key_id, ciphertext_sha256, reason, note, actor, request_id)
    VALUES
        (receipt, of_image, image.data_key_id, sha256(image.sealed), for_reason, with_note, by_actor, in_request);
    UPDATE lesion_images SET sealed = NULL, erased_at = clock_timestamp() WHERE image_id = of_image;
    -- Before the vectors: whoever completes the assessment now waits here, and then adds none.
    UPDATE assessments
    SET outcome = CASE WHEN outcome = 'pending' THEN 'cancelled' ELSE 'erased' END,
        answer = NULL, failure = NULL, context = '{}', lease_until = NULL,
        completed_at = coalesce(completed_at, now())
    WHERE image_id = of_image;
    DELETE FROM lesion_embeddings WHERE image_id = of_image;
    -- What was said of it stays, but for words that may tell of the image or of the patient.
    UPDATE reviews AS r SET note = NULL, note_salt = NULL
    FROM assessments AS a
    WHERE r.assessment_id = a.assessment_id AND a.image_id = of_image AND r.note IS NOT NULL;
    -- What the PMS was not told yet it is not told any more, of whichever kind.
    DELETE FROM outbox AS o
    USING assessments AS a
    WHERE o.assessment_id = a.assessment_id AND a.image_id = of_image AND o.delivered_at IS NULL;
    INSERT INTO audit_events (action, actor, outcome, patient_id, lesion_id, image_id, request_id, detail)
    VALUES ('erase', by_actor, 'success', image.patient_id, of_lesion, of_image, in_request,
            jsonb_build_object(
                'receipt_id', receipt,
                'reason', for_reason,
                'purpose', CASE WHEN for_reason IN ('patient_request', 'consent_withdrawn') THEN 'PATRQT' ELSE 'HOPERAT' END
            ));
    RETURN 'accepted';
END;
$$;

-- The one way to decide, and to answer a demand: the application's role can do neither itself.
CREATE FUNCTION record_review(of_lesion uuid, said reviews) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    image lesion_images;
    reviewed assessments;
    answered uuid[] := '{}';
BEGIN
    -- One review of a lesion after the other; and none of an image that is being erased, whose note would stay.
    PERFORM FROM lesions AS l WHERE l.lesion_id = of_lesion FOR NO KEY UPDATE;
    SELECT i.* INTO image FROM lesion_images AS i
    WHERE i.lesion_id = of_lesion
        AND i.image_id = (SELECT a.image_id FROM assessments AS a WHERE a.assessment_id = said.assessment_id)
    FOR SHARE;
    IF NOT FOUND THEN
        RETURN 'absent';
    END IF;
    SELECT a.* INTO reviewed FROM assessments AS a WHERE a.assessment_id = said.assessment_id;
    -- What an erased image demanded stays, and can be answered: without words on an image that is gone.
    IF image.erased_at IS NOT NULL
        AND (said.decision IS NULL OR reviewed.demand_level IS NULL OR num_nonnulls(said.note, said.before_answer) > 0) THEN
        RETURN 'erased';
    ELSIF reviewed.outcome = 'failed' THEN
        RETURN 'failed';
    ELSIF reviewed.outcome = 'pending' AND said.decision IS NOT NULL THEN
        RETURN 'pending';
    END IF;

    -- Its own demand, and of older images of the lesion what demands no more than it: what came later, or demands more, is
    -- answered by a decision of its own.
    IF said.decision IS NOT NULL THEN
        WITH closed AS (
            UPDATE assessments AS a SET demand_answered_at = clock_timestamp()
            FROM lesion_images AS i
            WHERE i.image_id = a.image_id
                AND i.lesion_id = of_lesion
                AND i.created_at <= image.created_at
                AND a.demand_level <= reviewed.demand_level
                AND a.demand_urgency <= reviewed.demand_urgency
                AND a.demand_answered_at IS NULL
            RETURNING a.assessment_id
        )
        SELECT coalesce(array_agg(c.assessment_id ORDER BY c.assessment_id), '{}') INTO answered FROM closed AS c;
    END IF;
    INSERT INTO reviews
        (review_id, assessment_id, clinician, request_id, decision, reason, diagnosis, level, urgency, referral_made,
         follow_up_by, note, note_salt, impression_diagnosis, intended_referral, before_answer, answers)
    VALUES
        (said.review_id, said.assessment_id, said.clinician, said.request_id, said.decision, said.reason, said.diagnosis,
         CASE said.decision WHEN 'accept' THEN reviewed.demand_level ELSE said.level END,
         CASE said.decision WHEN 'accept' THEN reviewed.demand_urgency ELSE said.urgency END,
         said.referral_made, said.follow_up_by, said.note, CASE WHEN said.note IS NOT NULL THEN gen_random_uuid() END,
         said.impression_diagnosis, said.intended_referral,
         said.before_answer, answered);
    RETURN 'recorded';
END;
$$;
COMMENT ON FUNCTION record_review IS
'Record what a clinician says of an assessment of the lesion: recorded, absent, erased (what is left is a demand to decide on, without a note), failed, or pending (a decision needs an answer). A decision answers its demand, and those of older images that demand no more.';
REVOKE EXECUTE ON FUNCTION record_review FROM PUBLIC;

-- A key may lead to a review or an outcome, too.
ALTER TABLE idempotency_keys ADD COLUMN created_id uuid;
ALTER TABLE idempotency_keys ALTER COLUMN image_id DROP NOT NULL;
ALTER TABLE idempotency_keys ALTER COLUMN assessment_id DROP NOT NULL;
COMMENT ON COLUMN idempotency_keys.created_id IS
'The review or outcome that it led to; null where it was an image.';

-- What a clinician did since an answer is looked up in the log when an impression comes.
CREATE INDEX audit_events_of_actor ON audit_events (actor, recorded_at);
