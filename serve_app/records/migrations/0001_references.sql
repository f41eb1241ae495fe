-- What the service compares with and answers by: confirmed reference cases, models, and which model is live.

-- In the embedded server it is there already: making it needs a superuser.
CREATE EXTENSION IF NOT EXISTS vector;

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
COMMENT ON TABLE models IS
'Models that have answered or may answer; the digest is that of the model folder.';

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

CREATE TABLE reference_images (
    isic_id text COLLATE "C" PRIMARY KEY CHECK (isic_id <> ''),
    lesion_id text,
    diagnosis text NOT NULL
    CHECK (diagnosis IN ('MEL', 'NV', 'BCC', 'AK', 'BKL', 'DF', 'VASC', 'SCC')),
    diagnosis_confirm_type text,
    age_approx smallint CHECK (age_approx BETWEEN 0 AND 120),
    sex text,
    anatom_site_general text,
    copyright_license text NOT NULL CHECK (copyright_license <> ''),
    attribution text NOT NULL CHECK (attribution <> '')
);
COMMENT ON TABLE reference_images IS
'Confirmed cases of the ISIC archive, in its own words; public, no patient of ours.';

CREATE TABLE reference_embeddings (
    embedding_space text NOT NULL REFERENCES embedding_spaces,
    isic_id text COLLATE "C" NOT NULL REFERENCES reference_images ON DELETE CASCADE,
    lesion_key text COLLATE "C" NOT NULL,
    malignant boolean NOT NULL,
    copyright_license text NOT NULL,
    anatom_site_general text,
    embedding halfvec(512) NOT NULL,
    PRIMARY KEY (embedding_space, isic_id)
);
-- 1 KB a row stays in the heap: a row that went to TOAST would make the exact scan 5 times slower.
ALTER TABLE reference_embeddings ALTER COLUMN embedding SET STORAGE PLAIN;
COMMENT ON TABLE reference_embeddings IS
'One vector a reference image and space, with copies of what the scan filters on: it reads no other table.';
COMMENT ON COLUMN reference_embeddings.lesion_key IS
'The lesion; the image itself where the archive does not know the lesion.';
