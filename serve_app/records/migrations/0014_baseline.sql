-- The baseline: with 0013, what the first builds came to in the steps 1 to 14.
-- Here: patients' lesions, who may see them, the audit log, the outbox, and erasure.

-- The clinical record: lesions, their sealed images, and assessments.

CREATE TABLE lesions (
    lesion_id uuid PRIMARY KEY,
    patient_id text NOT NULL CHECK (patient_id <> ''),
    created_at timestamptz NOT NULL,
    UNIQUE (lesion_id, patient_id)
);
CREATE INDEX lesions_of_patient ON lesions (patient_id, created_at DESC, lesion_id DESC);
COMMENT ON TABLE lesions IS
'A spot on a patient''s skin, followed over time; the patient is known by the opaque id of the PMS.';

CREATE TABLE lesion_images (
    image_id uuid PRIMARY KEY,
    lesion_id uuid NOT NULL,
    patient_id text NOT NULL,
    encounter_id text,
    created_at timestamptz NOT NULL,
    content_type text NOT NULL CHECK (content_type IN ('image/jpeg', 'image/png')),
    width integer NOT NULL CHECK (width > 0),
    height integer NOT NULL CHECK (height > 0),
    data_key_id uuid NOT NULL UNIQUE,
    -- Ciphertext does not compress.
    sealed bytea STORAGE EXTERNAL,
    erased_at timestamptz,
    CONSTRAINT lesion_images_sealed_until_erased CHECK ((sealed IS NULL) = (erased_at IS NOT NULL)),
    -- With the patient: an image cannot be filed under another patient's lesion.
    FOREIGN KEY (lesion_id, patient_id) REFERENCES lesions (lesion_id, patient_id)
);
CREATE INDEX lesion_images_of_lesion ON lesion_images (lesion_id, created_at DESC, image_id DESC);
COMMENT ON TABLE lesion_images IS
'Images sealed under a data key of their own (data_key_id), which is kept outside this database.';
COMMENT ON COLUMN lesion_images.erased_at IS
'When the erasure was accepted: the ciphertext is gone, and the row stays to say that there was an image.';

CREATE TABLE lesion_embeddings (
    image_id uuid NOT NULL REFERENCES lesion_images,
    embedding_space text NOT NULL REFERENCES embedding_spaces,
    embedding halfvec(512) NOT NULL,
    PRIMARY KEY (image_id, embedding_space)
);
COMMENT ON TABLE lesion_embeddings IS
'Vectors of patients'' images: protected health information, erased with the image, never searched as references.';

CREATE TABLE assessments (
    assessment_id uuid PRIMARY KEY,
    image_id uuid NOT NULL UNIQUE REFERENCES lesion_images,
    created_at timestamptz NOT NULL,
    outcome text NOT NULL,
    answer jsonb,
    completed_at timestamptz,
    context jsonb NOT NULL,
    top_k smallint NOT NULL CHECK (top_k BETWEEN 1 AND 50),
    licences text[] NOT NULL,
    actor text NOT NULL,
    request_id text NOT NULL,
    attempts smallint NOT NULL DEFAULT 0,
    lease_until timestamptz,
    failure text CHECK (failure <> ''),
    confirmed_only boolean NOT NULL DEFAULT false,
    CONSTRAINT assessments_outcome_known
    CHECK (outcome IN ('pending', 'decided', 'review', 'refused', 'failed', 'cancelled', 'erased')),
    CONSTRAINT assessments_answered CHECK ((answer IS NOT NULL) = (outcome IN ('decided', 'review', 'refused'))),
    CONSTRAINT assessments_completed CHECK ((completed_at IS NULL) = (outcome = 'pending')),
    CONSTRAINT assessments_failed CHECK ((failure IS NOT NULL) = (outcome = 'failed'))
);
CREATE INDEX assessments_pending ON assessments (created_at) WHERE outcome = 'pending';
COMMENT ON TABLE assessments IS
'The answer to one image; pending until the graph has given it, with all that is needed to ask again.';
COMMENT ON COLUMN assessments.outcome IS
'cancelled: the image was erased while the assessment was pending; erased: after it was answered.';
COMMENT ON COLUMN assessments.lease_until IS
'Until then, whoever claimed the pending assessment works on it; afterwards it is anyone''s again.';
COMMENT ON COLUMN assessments.failure IS 'Code of what keeps a failed assessment from ever having an answer.';
COMMENT ON COLUMN assessments.confirmed_only IS
'Whether only references of confirmed diagnosis were asked for, as `licences` says of which licences.';

CREATE TABLE idempotency_keys (
    actor text NOT NULL,
    key text NOT NULL CHECK (key <> ''),
    request_sha256 bytea NOT NULL CHECK (octet_length(request_sha256) = 32),
    lesion_id uuid NOT NULL REFERENCES lesions,
    image_id uuid NOT NULL REFERENCES lesion_images,
    assessment_id uuid NOT NULL REFERENCES assessments,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (actor, key)
);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
COMMENT ON TABLE idempotency_keys IS
'What a caller''s Idempotency-Key led to: the same key and request again is answered from here.';

-- Access: who looks after whom, who is locked out, and who went in without an assignment.

CREATE TABLE care_assignments (
    patient_id text NOT NULL CHECK (patient_id <> ''),
    clinician text NOT NULL CHECK (clinician <> ''),
    starts_at timestamptz NOT NULL,
    ends_at timestamptz CHECK (ends_at > starts_at),
    PRIMARY KEY (clinician, patient_id, starts_at)
);
COMMENT ON TABLE care_assignments IS
'Which clinician (subject of the token) looks after which patient, from when until when.';

CREATE TABLE revocations (
    kind text NOT NULL CHECK (kind IN ('subject', 'token')),
    value text NOT NULL CHECK (value <> ''),
    revoked_at timestamptz NOT NULL DEFAULT now(),
    revoked_by text NOT NULL CHECK (revoked_by <> ''),
    PRIMARY KEY (kind, value)
);
COMMENT ON TABLE revocations IS
'Subjects (`sub`) and single tokens (`jti`) that are refused from their next request on.';

CREATE TABLE emergency_accesses (
    emergency_id uuid PRIMARY KEY,
    patient_id text NOT NULL CHECK (patient_id <> ''),
    principal text NOT NULL CHECK (principal <> ''),
    reason text NOT NULL CHECK (char_length(reason) BETWEEN 10 AND 1000),
    starts_at timestamptz NOT NULL DEFAULT now(),
    ends_at timestamptz NOT NULL CHECK (ends_at > starts_at),
    reviewed_at timestamptz,
    reviewer text CHECK (reviewer <> principal),
    review_outcome text CHECK (review_outcome IN ('justified', 'not_justified', 'follow_up')),
    review_note text CHECK (char_length(review_note) <= 1000),
    CHECK (num_nonnulls(reviewed_at, reviewer, review_outcome) IN (0, 3))
);
CREATE INDEX emergency_accesses_of_principal ON emergency_accesses (principal, patient_id, ends_at);
CREATE INDEX emergency_accesses_unreviewed ON emergency_accesses (emergency_id) WHERE reviewed_at IS NULL;
COMMENT ON TABLE emergency_accesses IS
'Break-glass: a principal gave itself the rights of a care assignment for a time, and somebody else reviews that.';
COMMENT ON COLUMN emergency_accesses.reason IS
'In the principal''s own words; may speak of the patient, so it is here and never in the audit log.';

-- The audit log, and its chain: each seal holds the hash of its event and of the seal before.

CREATE TABLE audit_events (
    event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    action text NOT NULL CHECK (action <> ''),
    actor text NOT NULL,
    outcome text NOT NULL CHECK (outcome IN ('success', 'denied', 'failed')),
    patient_id text,
    -- Without foreign keys: a denied request names what does not exist, and events outlive what they tell of.
    lesion_id uuid,
    image_id uuid,
    assessment_id uuid,
    request_id text NOT NULL,
    detail jsonb NOT NULL
);
-- What a reviewer asks: what was done under this emergency access.
CREATE INDEX audit_events_of_emergency ON audit_events ((detail ->> 'emergency_access'))
WHERE detail ? 'emergency_access';
COMMENT ON TABLE audit_events IS
'Who did what to whose record, and whether they were let; the application may only add and read.';

CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'audit_events is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;
CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change();

CREATE TABLE audit_seals (
    position bigint PRIMARY KEY CHECK (position > 0),
    event_id bigint NOT NULL UNIQUE REFERENCES audit_events,
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    sealed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE audit_seals IS
'Added moments after their events, in one order, by one sealer at a time; added to, read, and never changed.';
COMMENT ON COLUMN audit_seals.hash IS
'SHA-256 of the hash before (32 zero bytes at first), the position (8 bytes, big-endian) and the SHA-256 of the event.';

CREATE FUNCTION refuse_seal_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'audit_seals is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;
CREATE TRIGGER audit_seals_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_seals
FOR EACH STATEMENT EXECUTE FUNCTION refuse_seal_change();

-- One form of an event, for ever: fields added to audit_events later need a function of their own.
CREATE FUNCTION audit_digest(e audit_events) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN sha256(convert_to(
    jsonb_build_array(
        (e).event_id, extract(epoch FROM (e).recorded_at), (e).action, (e).actor, (e).outcome, (e).patient_id,
        (e).lesion_id, (e).image_id, (e).assessment_id, (e).request_id, (e).detail
    )::text,
    'UTF8'
));
COMMENT ON FUNCTION audit_digest IS 'SHA-256 of an event: its fields in order, as JSON.';

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
COMMENT ON TABLE patient_encounters IS 'Whose encounter is whose, for the same directory.';

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
CREATE INDEX outbox_waiting ON outbox (encounter_id, position) WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX outbox_due ON outbox (due_at) WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX outbox_dead ON outbox (position) WHERE dead_at IS NOT NULL;
COMMENT ON TABLE outbox IS
'Assessments that the PMS is to be told of: written with the assessment, in its transaction; holds no finding itself.';
COMMENT ON COLUMN outbox.message_id IS 'The Idempotency-Key of every attempt.';
COMMENT ON COLUMN outbox.waiting_since IS
'From when its time to be delivered counts: when it was queued, or last sent again by an operator.';
COMMENT ON COLUMN outbox.dead_at IS
'When it was given up: nothing is sent again unless an operator says so (`derm-cds outbox retry`).';

-- Erasure: what is destroyed and what stays as its proof; legal holds, closed records, orphaned data keys.
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

CREATE FUNCTION refuse_erasure_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;
CREATE TRIGGER erasures_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON erasures
FOR EACH STATEMENT EXECUTE FUNCTION refuse_erasure_change();
CREATE TRIGGER erasure_receipts_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON erasure_receipts
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

CREATE TABLE condemned_data_keys (
    data_key_id uuid PRIMARY KEY,
    condemned_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE condemned_data_keys IS
'Data keys whose image never came, about to be swept: an image that comes after all is refused.';

-- Without the lock, image and sentence could pass each other by unseen ("dermkeys" in ASCII).
CREATE FUNCTION refuse_condemned_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7234314190719383923);
    IF EXISTS (SELECT FROM condemned_data_keys AS c WHERE c.data_key_id = NEW.data_key_id) THEN
        -- To the caller this is a lost race: the upload, sent again, gets a new key.
        RAISE EXCEPTION 'the data key was swept' USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NEW;
END;
$$;
CREATE TRIGGER lesion_images_key_not_condemned BEFORE INSERT ON lesion_images
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
    -- What the PMS was not told yet it is not told any more.
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
COMMENT ON FUNCTION erase_image IS
'Accept an erasure: accepted, erased (before), held (by a legal hold) or absent. The data key is to be destroyed next.';
REVOKE EXECUTE ON FUNCTION erase_image FROM PUBLIC;
