-- name: nearest
-- Find the K nearest references, one image a lesion, and the nearest benign and malignant of all.
-- $1 embedding, $2 space, $3 K, $4 licences, $5 sites (empty: any), $6 how many images to look at first.
-- Each row's distance is computed once: the scan below is exact, and needs no index. K lesions
-- nearly always show among the first $6 images; when many images of one lesion crowd them out,
-- `thorough` looks at all.
WITH near AS MATERIALIZED (
    (
        SELECT isic_id, lesion_key, malignant, embedding <=> $1 AS distance
        FROM reference_embeddings
        WHERE embedding_space = $2
            AND malignant
            AND (cardinality($4::text[]) = 0 OR copyright_license = ANY($4))
            AND (cardinality($5::text[]) = 0 OR anatom_site_general = ANY($5))
        ORDER BY distance, isic_id
        LIMIT $6
    )
    UNION ALL
    (
        SELECT isic_id, lesion_key, malignant, embedding <=> $1 AS distance
        FROM reference_embeddings
        WHERE embedding_space = $2
            AND NOT malignant
            AND (cardinality($4::text[]) = 0 OR copyright_license = ANY($4))
            AND (cardinality($5::text[]) = 0 OR anatom_site_general = ANY($5))
        ORDER BY distance, isic_id
        LIMIT $6
    )
),
-- The nearest $6 of each kind hold the nearest $6 of all; further ones might hide a nearer image of their lesion.
nearest_images AS MATERIALIZED (
    SELECT * FROM near
    ORDER BY distance, isic_id
    LIMIT $6
),
quick AS MATERIALIZED (
    SELECT DISTINCT ON (lesion_key) isic_id, distance
    FROM nearest_images
    ORDER BY lesion_key, distance, isic_id
),
thorough AS (
    SELECT DISTINCT ON (lesion_key) isic_id, embedding <=> $1 AS distance
    FROM reference_embeddings
    WHERE embedding_space = $2
        AND (SELECT count(*) FROM quick) < $3
        AND (SELECT count(*) FROM nearest_images) = $6
        AND (cardinality($4::text[]) = 0 OR copyright_license = ANY($4))
        AND (cardinality($5::text[]) = 0 OR anatom_site_general = ANY($5))
    ORDER BY lesion_key, distance, isic_id
),
found AS (
    (
        SELECT 'similar' AS role, isic_id, distance
        FROM (SELECT * FROM quick UNION SELECT * FROM thorough) AS either
        ORDER BY distance, isic_id
        LIMIT $3
    )
    UNION ALL
    (
        SELECT 'nearest_benign', isic_id, distance FROM near
        WHERE NOT malignant
        ORDER BY distance, isic_id
        LIMIT 1
    )
    UNION ALL
    (
        SELECT 'nearest_malignant', isic_id, distance FROM near
        WHERE malignant
        ORDER BY distance, isic_id
        LIMIT 1
    )
)
SELECT
    f.role, r.isic_id, r.lesion_id, r.diagnosis, r.diagnosis_confirm_type, 1 - f.distance AS similarity,
    r.age_approx, r.sex, r.anatom_site_general, r.copyright_license, r.attribution
FROM found AS f
INNER JOIN reference_images AS r USING (isic_id)
ORDER BY f.role, f.distance, f.isic_id;

-- name: count
-- Count the references of a space.
SELECT count(*) FROM reference_embeddings WHERE embedding_space = $1;

-- name: make_arrivals
-- Make the table that COPY fills; it ends with its transaction.
CREATE TEMPORARY TABLE arrivals (
    isic_id text COLLATE "C",
    lesion_id text,
    diagnosis text,
    diagnosis_confirm_type text,
    age_approx smallint,
    sex text,
    anatom_site_general text,
    copyright_license text,
    attribution text,
    malignant boolean,
    embedding halfvec(512)
) ON COMMIT DROP;

-- name: take_in_space
-- Make sure that the space exists.
INSERT INTO embedding_spaces (embedding_space) VALUES ($1) ON CONFLICT DO NOTHING;

-- name: take_in_images
-- Add the arrived images, or bring them up to date.
INSERT INTO reference_images
    (isic_id, lesion_id, diagnosis, diagnosis_confirm_type, age_approx, sex, anatom_site_general,
     copyright_license, attribution)
SELECT
    isic_id, lesion_id, diagnosis, diagnosis_confirm_type, age_approx, sex, anatom_site_general,
    copyright_license, attribution
FROM arrivals
ORDER BY isic_id
ON CONFLICT (isic_id) DO UPDATE
SET
    lesion_id = excluded.lesion_id,
    diagnosis = excluded.diagnosis,
    diagnosis_confirm_type = excluded.diagnosis_confirm_type,
    age_approx = excluded.age_approx,
    sex = excluded.sex,
    anatom_site_general = excluded.anatom_site_general,
    copyright_license = excluded.copyright_license,
    attribution = excluded.attribution;

-- name: take_in_copies
-- Bring the copies up to date that other spaces hold of what changed.
UPDATE reference_embeddings AS e
SET
    lesion_key = coalesce(a.lesion_id, a.isic_id),
    malignant = a.malignant,
    copyright_license = a.copyright_license,
    anatom_site_general = a.anatom_site_general
FROM arrivals AS a
WHERE e.isic_id = a.isic_id
    AND (e.lesion_key, e.malignant, e.copyright_license, e.anatom_site_general)
    IS DISTINCT FROM (coalesce(a.lesion_id, a.isic_id), a.malignant, a.copyright_license, a.anatom_site_general);

-- name: take_in_embeddings
-- Add the arrived embeddings to the space, or replace them.
INSERT INTO reference_embeddings
    (embedding_space, isic_id, lesion_key, malignant, copyright_license, anatom_site_general, embedding)
SELECT
    $1, isic_id, coalesce(lesion_id, isic_id), malignant, copyright_license, anatom_site_general, embedding
FROM arrivals
ORDER BY isic_id
ON CONFLICT (embedding_space, isic_id) DO UPDATE
SET
    lesion_key = excluded.lesion_key,
    malignant = excluded.malignant,
    copyright_license = excluded.copyright_license,
    anatom_site_general = excluded.anatom_site_general,
    embedding = excluded.embedding;

-- name: analyze
-- Let the planner know what is there now.
ANALYZE reference_images, reference_embeddings;

-- name: without_time_limits
-- Lift the time limits that a request has, for this transaction: loaders wait for each other.
SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', '0', true);
