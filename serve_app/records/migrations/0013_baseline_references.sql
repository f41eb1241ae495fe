-- The first half of the baseline: what the service compares with and answers by.

-- In the embedded server it is there already: making it needs a superuser.
CREATE EXTENSION IF NOT EXISTS vector;

-- Embedding spaces, models, and which model is live.

CREATE TABLE embedding_spaces (
    embedding_space text PRIMARY KEY CHECK (embedding_space <> ''),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE embedding_spaces IS
'Vector spaces: only embeddings of one space can be compared. All are 512 wide and of unit norm.';

CREATE TABLE models (
    model_id text NOT NULL CHECK (model_id <> ''),
    model_digest text NOT NULL CHECK (model_digest <> ''),
    embedding_space text NOT NULL REFERENCES embedding_spaces,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (model_id, model_digest),
    UNIQUE (model_id, model_digest, embedding_space)
);
COMMENT ON TABLE models IS 'Models that have answered or may answer; the digest is that of the model folder.';

CREATE TABLE serving (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    model_id text NOT NULL,
    model_digest text NOT NULL,
    embedding_space text NOT NULL,
    served_since timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (model_id, model_digest, embedding_space)
    REFERENCES models (model_id, model_digest, embedding_space)
);
COMMENT ON TABLE serving IS
'One row, and nothing else, says which model answers and in which embedding space.';

CREATE TABLE publications (
    publication_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    action text NOT NULL CHECK (action IN ('publish', 'promote', 'rollback')),
    model_id text NOT NULL,
    model_digest text NOT NULL,
    embedding_space text NOT NULL,
    approved_by text NOT NULL CHECK (approved_by <> ''),
    reason text NOT NULL CHECK (reason <> ''),
    report_sha256 text CHECK (report_sha256 ~ '^[0-9a-f]{64}$'),
    -- Unique: two rollbacks at once cannot both take back the same publication.
    takes_back bigint UNIQUE REFERENCES publications,
    CHECK ((action = 'rollback') = (takes_back IS NOT NULL)),
    FOREIGN KEY (model_id, model_digest, embedding_space)
    REFERENCES models (model_id, model_digest, embedding_space)
);
COMMENT ON TABLE publications IS
'History of `serving`, written in the same transaction; it is added to, read, and never changed.';
COMMENT ON COLUMN publications.report_sha256 IS 'SHA-256 of the promotion report that was accepted.';
COMMENT ON COLUMN publications.takes_back IS 'The publication that a rollback undid.';

CREATE FUNCTION refuse_publication_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'publications is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;
CREATE TRIGGER publications_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON publications
FOR EACH STATEMENT EXECUTE FUNCTION refuse_publication_change();

-- The references: confirmed cases, their vectors, and what fills a space.

CREATE TABLE reference_images (
    isic_id text COLLATE "C" PRIMARY KEY CHECK (isic_id <> ''),
    lesion_id text,
    diagnosis text NOT NULL CHECK (diagnosis IN ('MEL', 'NV', 'BCC', 'AK', 'BKL', 'DF', 'VASC', 'SCC')),
    diagnosis_confirm_type text,
    age_approx smallint CHECK (age_approx BETWEEN 0 AND 120),
    sex text,
    anatom_site_general text,
    copyright_license text NOT NULL CHECK (copyright_license <> ''),
    attribution text NOT NULL CHECK (attribution <> '')
);
-- Not valid: what an older database has is left for the invariant references_licensed to name.
ALTER TABLE reference_images
ADD CONSTRAINT reference_images_licensed CHECK (copyright_license IN ('CC-0', 'CC-BY', 'CC-BY-NC')) NOT VALID;
COMMENT ON TABLE reference_images IS
'Confirmed cases of the ISIC archive, in its own words; public, no patient of ours.';

CREATE TABLE reference_embeddings (
    embedding_space text NOT NULL REFERENCES embedding_spaces,
    isic_id text COLLATE "C" NOT NULL REFERENCES reference_images ON DELETE CASCADE,
    lesion_key text COLLATE "C" NOT NULL,
    malignant boolean NOT NULL,
    copyright_license text NOT NULL,
    anatom_site_general text,
    -- 1 KB a row stays in the heap: a row that went to TOAST would make the exact scan 5 times slower.
    embedding halfvec(512) STORAGE PLAIN NOT NULL,
    confirmed boolean NOT NULL,
    diagnosis text NOT NULL,
    PRIMARY KEY (embedding_space, isic_id)
);
-- A selective filter reads only the rows that pass it.
CREATE INDEX reference_embeddings_of_sort
ON reference_embeddings (embedding_space, malignant, copyright_license, anatom_site_general, confirmed, diagnosis);
COMMENT ON TABLE reference_embeddings IS
'One vector a reference image and space, with copies of what the scan filters on: it reads no other table.';
COMMENT ON COLUMN reference_embeddings.lesion_key IS
'The lesion; the image itself where the archive does not know the lesion.';
COMMENT ON COLUMN reference_embeddings.confirmed IS
'Whether the archive says how the diagnosis was confirmed (reference_images.diagnosis_confirm_type).';

-- By these the search chooses between its indexes and looking at all.
CREATE TABLE reference_counts (
    embedding_space text NOT NULL REFERENCES embedding_spaces ON DELETE CASCADE,
    malignant boolean NOT NULL,
    diagnosis text NOT NULL,
    copyright_license text NOT NULL,
    anatom_site_general text,
    confirmed boolean NOT NULL,
    images integer NOT NULL CHECK (images > 0),
    UNIQUE NULLS NOT DISTINCT
    (embedding_space, malignant, diagnosis, copyright_license, anatom_site_general, confirmed)
);
COMMENT ON TABLE reference_counts IS
'What loading counted in reference_embeddings. Only the way of searching depends on it, never what is found.';

CREATE TABLE space_embedders (
    embedding_space text PRIMARY KEY REFERENCES embedding_spaces ON DELETE CASCADE,
    model_id text NOT NULL CHECK (model_id <> ''),
    embedder_digest text NOT NULL CHECK (embedder_digest ~ '^[0-9a-f]{64}$'),
    preprocess_version text NOT NULL CHECK (preprocess_version <> ''),
    images_expected integer NOT NULL CHECK (images_expected > 0),
    begun_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz
);
COMMENT ON TABLE space_embedders IS
'By what a job fills a space: vectors of two embedders must never lie in one. Spaces filled from a model''s own bundle have no row.';
COMMENT ON COLUMN space_embedders.completed_at IS
'When every expected image was in the space, or in reference_failures, and indexed; null while a job fills it.';

CREATE TABLE reference_failures (
    embedding_space text NOT NULL REFERENCES embedding_spaces ON DELETE CASCADE,
    isic_id text COLLATE "C" NOT NULL CHECK (isic_id <> ''),
    cause text NOT NULL CHECK (cause <> ''),
    detail text NOT NULL,
    failed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (embedding_space, isic_id)
);
COMMENT ON TABLE reference_failures IS
'Images that a job could not embed, and why; the row goes when a later job can.';

CREATE TABLE reference_pictures (
    isic_id text COLLATE "C" PRIMARY KEY REFERENCES reference_images ON DELETE CASCADE,
    width smallint NOT NULL CHECK (width > 0),
    height smallint NOT NULL CHECK (height > 0),
    sha256 text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    -- JPEG does not compress; in a place of its own it does not widen what other columns are read from.
    jpeg bytea STORAGE EXTERNAL NOT NULL
);
COMMENT ON TABLE reference_pictures IS
'One small JPEG, without metadata, of a reference image, made once by the job that embedded it.';
