-- A search may be limited to references whose diagnosis is known to be confirmed; the assessment keeps that it was.

-- Only the exceptions are written: an updated row is written anew, and into its index.
ALTER TABLE reference_embeddings ADD COLUMN confirmed boolean NOT NULL DEFAULT true;
UPDATE reference_embeddings AS e
SET confirmed = false
FROM reference_images AS r
WHERE e.isic_id = r.isic_id AND coalesce(r.diagnosis_confirm_type, '') = '';
ALTER TABLE reference_embeddings ALTER COLUMN confirmed DROP DEFAULT;
COMMENT ON COLUMN reference_embeddings.confirmed IS
'Whether the archive says how the diagnosis was confirmed (reference_images.diagnosis_confirm_type).';

DROP TABLE reference_counts;
CREATE TABLE reference_counts (
    embedding_space text NOT NULL REFERENCES embedding_spaces ON DELETE CASCADE,
    malignant boolean NOT NULL,
    copyright_license text NOT NULL,
    anatom_site_general text,
    confirmed boolean NOT NULL,
    images integer NOT NULL CHECK (images > 0),
    UNIQUE NULLS NOT DISTINCT (embedding_space, malignant, copyright_license, anatom_site_general, confirmed)
);
COMMENT ON TABLE reference_counts IS
'What loading counted in reference_embeddings. Only the way of searching depends on it, never what is found.';
INSERT INTO reference_counts (embedding_space, malignant, copyright_license, anatom_site_general, confirmed, images)
SELECT embedding_space, malignant, copyright_license, anatom_site_general, confirmed, count(*)
FROM reference_embeddings
GROUP BY embedding_space, malignant, copyright_license, anatom_site_general, confirmed;

DROP INDEX reference_embeddings_of_sort;
CREATE INDEX reference_embeddings_of_sort
ON reference_embeddings (embedding_space, malignant, copyright_license, anatom_site_general, confirmed);

-- What was asked before this could be asked for was not limited so.
ALTER TABLE assessments ADD COLUMN confirmed_only boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN assessments.confirmed_only IS
'Whether only references of confirmed diagnosis were asked for, as `licences` says of which licences.';
