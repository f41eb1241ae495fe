-- A search may be limited to references of some diagnoses; a scan reads no other table, so each row has a copy of its own.

-- Every row gets one. Updated rows would go into their HNSW index one at a time, beside what they were before: the table
-- is rewritten instead, in the order it has, and its indexes are built anew, in memory (a limit, not taken whole).
SELECT set_config('maintenance_work_mem', '1GB', true);
CREATE FUNCTION pg_temp.diagnosis_of(isic_id text) RETURNS text
LANGUAGE sql STABLE
AS $$ SELECT r.diagnosis FROM reference_images AS r WHERE r.isic_id = $1 $$;
DROP INDEX reference_embeddings_of_sort;
ALTER TABLE reference_embeddings ADD COLUMN diagnosis text;
ALTER TABLE reference_embeddings ALTER COLUMN diagnosis TYPE text USING pg_temp.diagnosis_of(isic_id);
ALTER TABLE reference_embeddings ALTER COLUMN diagnosis SET NOT NULL;
DROP FUNCTION pg_temp.diagnosis_of;
CREATE INDEX reference_embeddings_of_sort
ON reference_embeddings (embedding_space, malignant, copyright_license, anatom_site_general, confirmed, diagnosis);

DROP TABLE reference_counts;
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
INSERT INTO reference_counts
    (embedding_space, malignant, diagnosis, copyright_license, anatom_site_general, confirmed, images)
SELECT embedding_space, malignant, diagnosis, copyright_license, anatom_site_general, confirmed, count(*)
FROM reference_embeddings
GROUP BY embedding_space, malignant, diagnosis, copyright_license, anatom_site_general, confirmed;

-- A rewritten table has no statistics of its new column, and its plans are made for the very parameters.
ANALYZE reference_embeddings, reference_counts;
