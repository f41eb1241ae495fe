-- The reference cache: what fills a space, which images could not be taken in, and pictures to show.

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
    jpeg bytea NOT NULL
);
-- JPEG does not compress; in a place of its own it does not widen what other columns are read from.
ALTER TABLE reference_pictures ALTER COLUMN jpeg SET STORAGE EXTERNAL;
COMMENT ON TABLE reference_pictures IS
'One small JPEG, without metadata, of a reference image, made once by the job that embedded it.';
