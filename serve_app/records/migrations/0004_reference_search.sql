-- How many references there are of each sort, by which the search chooses between its indexes and looking at all.

CREATE TABLE reference_counts (
    embedding_space text NOT NULL REFERENCES embedding_spaces ON DELETE CASCADE,
    malignant boolean NOT NULL,
    copyright_license text NOT NULL,
    anatom_site_general text,
    images integer NOT NULL CHECK (images > 0),
    UNIQUE NULLS NOT DISTINCT (embedding_space, malignant, copyright_license, anatom_site_general)
);
COMMENT ON TABLE reference_counts IS
'What loading counted in reference_embeddings. Only the way of searching depends on it, never what is found.';

INSERT INTO reference_counts (embedding_space, malignant, copyright_license, anatom_site_general, images)
SELECT embedding_space, malignant, copyright_license, anatom_site_general, count(*)
FROM reference_embeddings
GROUP BY embedding_space, malignant, copyright_license, anatom_site_general;

-- A selective filter reads only the rows that pass it.
CREATE INDEX reference_embeddings_of_sort
ON reference_embeddings (embedding_space, malignant, copyright_license, anatom_site_general);
