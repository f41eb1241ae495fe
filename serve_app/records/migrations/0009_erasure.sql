-- Erasure: what is destroyed and what stays as its proof; legal holds, closed records, orphaned data keys.

ALTER TABLE lesion_images ALTER COLUMN sealed DROP NOT NULL;
ALTER TABLE lesion_images ADD COLUMN erased_at timestamptz;
ALTER TABLE lesion_images ADD CONSTRAINT lesion_images_sealed_until_erased
CHECK ((sealed IS NULL) = (erased_at IS NOT NULL));
COMMENT ON COLUMN lesion_images.erased_at IS
'When the erasure was accepted: the ciphertext is gone, and the row stays to say that there was an image.';

ALTER TABLE assessments ADD COLUMN failure text CHECK (failure <> '');
ALTER TABLE assessments DROP CONSTRAINT assessments_outcome_check;
ALTER TABLE assessments DROP CONSTRAINT assessments_check;
ALTER TABLE assessments DROP CONSTRAINT assessments_check1;
ALTER TABLE assessments ADD CONSTRAINT assessments_outcome_known
CHECK (outcome IN ('pending', 'decided', 'review', 'refused', 'failed', 'cancelled', 'erased'));
ALTER TABLE assessments ADD CONSTRAINT assessments_answered
CHECK ((answer IS NOT NULL) = (outcome IN ('decided', 'review', 'refused')));
ALTER TABLE assessments ADD CONSTRAINT assessments_completed
CHECK ((completed_at IS NULL) = (outcome = 'pending'));
ALTER TABLE assessments ADD CONSTRAINT assessments_failed
CHECK ((failure IS NOT NULL) = (outcome = 'failed'));
COMMENT ON COLUMN assessments.failure IS
'Code of what keeps a failed assessment from ever having an answer.';
COMMENT ON COLUMN assessments.outcome IS
'cancelled: the image was erased while the assessment was pending; erased: after it was answered.';

-- An erasure is accepted in one transaction and proven in another one, after the data key is gone.
CREATE TABLE erasures (
    receipt_id uuid PRIMARY KEY,
    image_id uuid NOT NULL UNIQUE REFERENCES lesion_images,
    data_key_id uuid NOT NULL,
    ciphertext_sha256 bytea NOT NULL CHECK (octet_length(ciphertext_sha256) = 32),
    reason text NOT NULL CHECK (reason IN
        ('patient_request', 'consent_withdrawn', 'wrong_patient', 'uploaded_in_error', 'retention')),
    note text CHECK (char_length(note) BETWEEN 1 AND 500),
    actor text NOT NULL CHECK (actor <> ''),
    request_id text NOT NULL,
    accepted_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE erasures IS
'Which image is to be destroyed, by whom and why; added to, read, and never changed. Without a receipt, its key may still be there.';

CREATE TABLE erasure_receipts (
    receipt_id uuid PRIMARY KEY REFERENCES erasures,
    erased_at timestamptz NOT NULL,
    record_hash bytea NOT NULL CHECK (octet_length(record_hash) = 32)
);
COMMENT ON TABLE erasure_receipts IS
'Proof that the data key of an erased image is destroyed; added to, read, and never changed.';
COMMENT ON COLUMN erasure_receipts.record_hash IS
'SHA-256 of the receipt''s fields (serve_app/security/receipts.py); the audit log holds it too.';

CREATE FUNCTION refuse_erasure_change() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;
CREATE TRIGGER erasures_append_only
BEFORE UPDATE OR DELETE OR TRUNCATE ON erasures
FOR EACH STATEMENT EXECUTE FUNCTION refuse_erasure_change();
CREATE TRIGGER erasure_receipts_append_only
BEFORE UPDATE OR DELETE OR TRUNCATE ON erasure_receipts
FOR EACH STATEMENT EXECUTE FUNCTION refuse_erasure_change();

CREATE TABLE legal_holds (
    hold_id uuid PRIMARY KEY,
    patient_id text CHECK (patient_id <> ''),
    lesion_id uuid REFERENCES lesions,
    image_id uuid REFERENCES lesion_images,
    reason text NOT NULL CHECK (char_length(reason) BETWEEN 1 AND 200),
    set_by text NOT NULL CHECK (set_by <> ''),
    set_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    released_by text CHECK (released_by <> ''),
    released_at timestamptz,
    CHECK (num_nonnulls(patient_id, lesion_id, image_id) = 1),
    CHECK ((released_at IS NULL) = (released_by IS NULL))
);
CREATE INDEX legal_holds_in_force ON legal_holds (patient_id, lesion_id, image_id) WHERE released_at IS NULL;
COMMENT ON TABLE legal_holds IS
'What must not be erased while a hold is in force: one image, a lesion''s, or a patient''s, those to come too.';

CREATE FUNCTION is_held(i lesion_images) RETURNS boolean
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT EXISTS (
        SELECT FROM legal_holds AS h
        WHERE h.released_at IS NULL
            AND (h.patient_id = i.patient_id OR h.lesion_id = i.lesion_id OR h.image_id = i.image_id)
    );
END;

CREATE TABLE closed_records (
    patient_id text PRIMARY KEY CHECK (patient_id <> ''),
    closed_at timestamptz NOT NULL,
    closed_by text NOT NULL CHECK (closed_by <> '')
);
COMMENT ON TABLE closed_records IS
'Patients whose record the hospital has closed: from then on the retention period of their images runs.';

CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

CREATE TABLE condemned_data_keys (
    data_key_id uuid PRIMARY KEY,
    condemned_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE condemned_data_keys IS
'Data keys whose image never came, about to be swept: an image that comes after all is refused.';

-- Without the lock, image and sentence could pass each other by unseen ("dermkeys" in ASCII).
CREATE FUNCTION refuse_condemned_key() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7234314190719383923);
    IF EXISTS (SELECT FROM condemned_data_keys AS c WHERE c.data_key_id = NEW.data_key_id) THEN
        -- To the caller this is a lost race: the upload, sent again, gets a new key.
        RAISE EXCEPTION 'the data key was swept' USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NEW;
END;
$$;
CREATE TRIGGER lesion_images_key_not_condemned
BEFORE INSERT ON lesion_images
FOR EACH ROW EXECUTE FUNCTION refuse_condemned_key();

-- The one way to erase an image: the application's role can neither change nor delete an image itself.
CREATE FUNCTION erase_image(
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
    -- What the PMS was not told yet it is not told any more (the outbox comes with a later migration).
    IF to_regclass('public.outbox') IS NOT NULL THEN
        DELETE FROM outbox AS o
        USING assessments AS a
        WHERE o.assessment_id = a.assessment_id AND a.image_id = of_image AND o.delivered_at IS NULL;
    END IF;
    INSERT INTO audit_events (action, actor, outcome, patient_id, lesion_id, image_id, request_id, detail)
    VALUES ('erase', by_actor, 'success', image.patient_id, of_lesion, of_image, in_request,
            jsonb_build_object('receipt_id', receipt, 'reason', for_reason));
    RETURN 'accepted';
END;
$$;
COMMENT ON FUNCTION erase_image IS
'Accept an erasure: accepted, erased (before), held (by a legal hold) or absent. The data key is to be destroyed next.';
REVOKE EXECUTE ON FUNCTION erase_image FROM PUBLIC;
