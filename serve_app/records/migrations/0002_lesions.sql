-- The clinical record: lesions, their sealed images, assessments, and who looks after whom.

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
    sealed bytea NOT NULL,
    -- With the patient: an image cannot be filed under another patient's lesion.
    FOREIGN KEY (lesion_id, patient_id) REFERENCES lesions (lesion_id, patient_id)
);
-- Ciphertext does not compress.
ALTER TABLE lesion_images ALTER COLUMN sealed SET STORAGE EXTERNAL;
CREATE INDEX lesion_images_of_lesion ON lesion_images (lesion_id, created_at DESC, image_id DESC);
COMMENT ON TABLE lesion_images IS
'Images sealed under a data key of their own (data_key_id), which is kept outside this database.';

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
    outcome text NOT NULL CHECK (outcome IN ('pending', 'decided', 'review', 'refused')),
    answer jsonb,
    completed_at timestamptz,
    context jsonb NOT NULL,
    top_k smallint NOT NULL CHECK (top_k BETWEEN 1 AND 50),
    licences text[] NOT NULL,
    actor text NOT NULL,
    request_id text NOT NULL,
    attempts smallint NOT NULL DEFAULT 0,
    lease_until timestamptz,
    CHECK ((outcome = 'pending') = (answer IS NULL)),
    CHECK ((outcome = 'pending') = (completed_at IS NULL))
);
CREATE INDEX assessments_pending ON assessments (created_at) WHERE outcome = 'pending';
COMMENT ON TABLE assessments IS
'The answer to one image; pending until the graph has given it, with all that is needed to ask again.';
COMMENT ON COLUMN assessments.lease_until IS
'Until then, whoever claimed the pending assessment works on it; afterwards it is anyone''s again.';

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
COMMENT ON TABLE idempotency_keys IS
'What a caller''s Idempotency-Key led to: the same key and request again is answered from here.';

CREATE TABLE care_assignments (
    patient_id text NOT NULL CHECK (patient_id <> ''),
    clinician text NOT NULL CHECK (clinician <> ''),
    starts_at timestamptz NOT NULL,
    ends_at timestamptz CHECK (ends_at > starts_at),
    PRIMARY KEY (clinician, patient_id, starts_at)
);
COMMENT ON TABLE care_assignments IS
'Which clinician (subject of the token) looks after which patient, from when until when.';
