-- name: count_kinds
-- Count the references of space $1, malignant and not; those that licences $2, sites $3 (empty: any) and $4 (only
-- confirmed ones) let pass, whatever their diagnosis; and those of them that diagnoses $5 (empty: any) let pass, too.
SELECT
    malignant,
    sum(images) AS images,
    coalesce(sum(images) FILTER (WHERE alike), 0) AS alike,
    coalesce(sum(images) FILTER (WHERE alike AND (cardinality($5::text[]) = 0 OR diagnosis = ANY($5))), 0) AS passing
FROM (
    SELECT
        malignant,
        diagnosis,
        images,
        (cardinality($2::text[]) = 0 OR copyright_license = ANY($2))
        AND (cardinality($3::text[]) = 0 OR coalesce(anatom_site_general = ANY($3), false))
        AND (NOT $4::boolean OR confirmed) AS alike
    FROM reference_counts
    WHERE embedding_space = $1
) AS counted
GROUP BY malignant;

-- name: plan_for_parameters
-- Set this transaction up for filters and the indexes of a space, each walked $1 wide: docs/references.md says why
-- these values.
-- Both need a plan made for the very parameters: an index of a space has its name in its condition.
-- Relaxed order finds more than strict; `nearest` sorts what was found. Without enable_sort the planner
-- does not weigh sorting a whole kind against its index, which has been weighed already.
SELECT
    set_config('plan_cache_mode', 'force_custom_plan', true),
    set_config('enable_sort', 'off', true),
    set_config('hnsw.iterative_scan', 'relaxed_order', true),
    set_config('hnsw.ef_search', $1::integer::text, true),
    set_config('hnsw.max_scan_tuples', '20000', true);

-- name: nearest
-- Find the K nearest references, one image a lesion, and the nearest benign and malignant of all.
-- $1 embedding, $2 space, $3 K, $4 licences, $5 sites (empty: any), $6 only confirmed ones, $7 diagnoses (empty: any),
-- $8 how many images to look at first, $9 the kinds (malignant: true or false) to look through one by one; the others
-- are found by their index. K lesions nearly always show among the first $8 images; when many images of one lesion
-- crowd them out, `thorough` looks at all that were looked through.
WITH passing AS NOT MATERIALIZED (
    SELECT isic_id, lesion_key, malignant, embedding, embedding <=> $1 AS distance
    FROM reference_embeddings
    WHERE embedding_space = $2
        AND (cardinality($4::text[]) = 0 OR copyright_license = ANY($4))
        AND (cardinality($5::text[]) = 0 OR anatom_site_general = ANY($5))
        AND (NOT $6::boolean OR confirmed)
        AND (cardinality($7::text[]) = 0 OR diagnosis = ANY($7))
),
looked_through AS MATERIALIZED (
    SELECT isic_id, lesion_key, malignant, distance
    FROM passing
    WHERE malignant = ANY($9::boolean[])
),
near AS MATERIALIZED (
    (SELECT * FROM looked_through WHERE malignant ORDER BY distance, isic_id LIMIT $8)
    UNION ALL
    (SELECT * FROM looked_through WHERE NOT malignant ORDER BY distance, isic_id LIMIT $8)
    UNION ALL
    (SELECT isic_id, lesion_key, malignant, distance FROM passing
     WHERE malignant AND true <> ALL($9) ORDER BY embedding <=> $1 LIMIT $8)
    UNION ALL
    (SELECT isic_id, lesion_key, malignant, distance FROM passing
     WHERE NOT malignant AND false <> ALL($9) ORDER BY embedding <=> $1 LIMIT $8)
),
-- The nearest $8 of each kind hold the nearest $8 of all; further ones might hide a nearer image of their lesion.
nearest_images AS MATERIALIZED (
    SELECT * FROM near ORDER BY distance, isic_id LIMIT $8
),
quick AS MATERIALIZED (
    SELECT DISTINCT ON (lesion_key) isic_id, distance
    FROM nearest_images
    ORDER BY lesion_key, distance, isic_id
),
thorough AS (
    SELECT DISTINCT ON (lesion_key) isic_id, distance
    FROM looked_through
    WHERE (SELECT count(*) FROM quick) < $3
        AND (SELECT count(*) FROM nearest_images) = $8
    ORDER BY lesion_key, distance, isic_id
),
found AS (
    (SELECT 'similar' AS role, isic_id, distance FROM (SELECT * FROM quick UNION SELECT * FROM thorough) AS either
     ORDER BY distance, isic_id LIMIT $3)
    UNION ALL
    (SELECT 'nearest_benign', isic_id, distance FROM near
     WHERE NOT malignant ORDER BY distance, isic_id LIMIT 1)
    UNION ALL
    (SELECT 'nearest_malignant', isic_id, distance FROM near
     WHERE malignant ORDER BY distance, isic_id LIMIT 1)
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
    LIKE reference_images,
    malignant boolean,
    confirmed boolean,
    embedding halfvec(512)
) ON COMMIT DROP;

-- name: wait_for_loaders
-- Let nobody else write references until this transaction ends; searches go on.
-- It covers the lock that making an index takes: two loaders that both asked for that later would be stuck.
LOCK TABLE reference_embeddings IN SHARE ROW EXCLUSIVE MODE;

-- name: leave_only_arrivals
-- Delete from space $1 what has not arrived.
DELETE FROM reference_embeddings AS e
WHERE e.embedding_space = $1 AND NOT EXISTS (SELECT FROM arrivals AS a WHERE a.isic_id = e.isic_id);

-- name: take_in_space
-- Make sure that the space exists.
INSERT INTO embedding_spaces (embedding_space) VALUES ($1) ON CONFLICT DO NOTHING;

-- name: take_in_images
-- Add the arrived images, or bring them up to date, wherever they are.
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
    (lesion_id, diagnosis, diagnosis_confirm_type, age_approx, sex, anatom_site_general, copyright_license, attribution)
    = (excluded.lesion_id, excluded.diagnosis, excluded.diagnosis_confirm_type, excluded.age_approx, excluded.sex,
       excluded.anatom_site_general, excluded.copyright_license, excluded.attribution);

-- Other spaces hold copies of what changed.
UPDATE reference_embeddings AS e
SET
    (lesion_key, malignant, diagnosis, copyright_license, anatom_site_general, confirmed)
    = (coalesce(a.lesion_id, a.isic_id), a.malignant, a.diagnosis, a.copyright_license, a.anatom_site_general,
       a.confirmed)
FROM arrivals AS a
WHERE e.isic_id = a.isic_id
    AND (e.lesion_key, e.malignant, e.diagnosis, e.copyright_license, e.anatom_site_general, e.confirmed)
    IS DISTINCT FROM
    (coalesce(a.lesion_id, a.isic_id), a.malignant, a.diagnosis, a.copyright_license, a.anatom_site_general,
     a.confirmed);

-- name: take_in_embeddings
-- Add the arrived embeddings to the space, or replace them; images that pass one filter lie side by side.
INSERT INTO reference_embeddings
    (embedding_space, isic_id, lesion_key, malignant, diagnosis, copyright_license, anatom_site_general, confirmed,
     embedding)
SELECT
    $1, isic_id, coalesce(lesion_id, isic_id), malignant, diagnosis, copyright_license, anatom_site_general, confirmed,
    embedding
FROM arrivals
ORDER BY malignant, copyright_license, anatom_site_general, confirmed, diagnosis, isic_id
ON CONFLICT (embedding_space, isic_id) DO UPDATE
SET
    (lesion_key, malignant, diagnosis, copyright_license, anatom_site_general, confirmed, embedding)
    = (excluded.lesion_key, excluded.malignant, excluded.diagnosis, excluded.copyright_license,
       excluded.anatom_site_general, excluded.confirmed, excluded.embedding);

-- name: recount
-- Count the sorts of reference anew, in every space: loading changes the copies of others too.
DELETE FROM reference_counts;
INSERT INTO reference_counts
    (embedding_space, malignant, diagnosis, copyright_license, anatom_site_general, confirmed, images)
SELECT embedding_space, malignant, diagnosis, copyright_license, anatom_site_general, confirmed, count(*)
FROM reference_embeddings
GROUP BY embedding_space, malignant, diagnosis, copyright_license, anatom_site_general, confirmed;

-- name: index_statements
-- Write the statement that indexes each kind of which space $1 holds at least $2 images.
SELECT
    format(
        'CREATE INDEX IF NOT EXISTS %I ON reference_embeddings USING hnsw (embedding halfvec_cosine_ops) '
        'WITH (m = 16, ef_construction = 128) WHERE embedding_space = %L AND %s',
        'reference_hnsw_' || left(md5($1), 16) || CASE WHEN malignant THEN '_malignant' ELSE '_benign' END,
        $1,
        CASE WHEN malignant THEN 'malignant' ELSE 'NOT malignant' END
    )
FROM reference_counts
WHERE embedding_space = $1
GROUP BY malignant
HAVING sum(images) >= $2
ORDER BY malignant;

-- name: analyze
-- Let the planner know what is there now.
ANALYZE reference_images, reference_embeddings, reference_counts;

-- name: prepare_to_load
-- Lift the time limits that a request has, for this transaction: loaders wait for each other. Its indexes are built in
-- memory: a limit, of which a graph takes what it needs.
SELECT
    set_config('maintenance_work_mem', '1GB', true),
    set_config('statement_timeout', '0', true),
    set_config('lock_timeout', '0', true);

-- name: claim_space
-- Say what fills space $1, and that it is not complete; what was said of the embedder before stays, and comes back.
INSERT INTO space_embedders AS known (embedding_space, model_id, embedder_digest, preprocess_version, images_expected)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (embedding_space) DO UPDATE
SET images_expected = greatest(known.images_expected, excluded.images_expected), completed_at = NULL
RETURNING model_id, embedder_digest;

-- name: embedder
-- What fills space $1.
SELECT embedding_space, model_id, embedder_digest, preprocess_version
FROM space_embedders
WHERE embedding_space = $1;

-- name: count_unfit
-- Count the vectors of space $1 that are not of unit norm, to the precision of a halfvec.
SELECT count(*) FROM reference_embeddings
WHERE embedding_space = $1 AND abs(l2_norm(embedding) - 1) > 0.01;

-- name: sample
-- Take $2 vectors of space $1, the same ones each time.
SELECT isic_id, embedding FROM reference_embeddings
WHERE embedding_space = $1
ORDER BY md5(isic_id), isic_id
LIMIT $2;

-- name: present
-- Name the images of space $1; with $2, only those that have a picture too.
SELECT e.isic_id
FROM reference_embeddings AS e
WHERE e.embedding_space = $1
    AND (NOT $2 OR EXISTS (SELECT FROM reference_pictures AS p WHERE p.isic_id = e.isic_id));

-- name: forgive
-- Forget the failures of what has arrived now.
DELETE FROM reference_failures
WHERE embedding_space = $1 AND isic_id IN (SELECT isic_id FROM arrivals);

-- name: take_in_failure
-- Note that image $2 could not be taken into space $1, and why.
INSERT INTO reference_failures (embedding_space, isic_id, cause, detail) VALUES ($1, $2, $3, $4)
ON CONFLICT (embedding_space, isic_id) DO UPDATE
SET cause = excluded.cause, detail = excluded.detail, failed_at = now();

-- name: take_in_picture
-- Keep the picture of an image, or replace it.
INSERT INTO reference_pictures (isic_id, width, height, sha256, jpeg) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (isic_id) DO UPDATE
SET width = excluded.width, height = excluded.height, sha256 = excluded.sha256, jpeg = excluded.jpeg
WHERE reference_pictures.sha256 <> excluded.sha256;

-- name: failures
-- Name the images that could not be taken into space $1, with the cause.
SELECT isic_id, cause FROM reference_failures WHERE embedding_space = $1;

-- name: completed
-- Note that all there is to fill space $1 with has been tried, and is indexed.
UPDATE space_embedders SET completed_at = now() WHERE embedding_space = $1;

-- name: spaces
-- List the spaces with what fills them, how many references they hold, and whether they are live.
SELECT
    s.embedding_space,
    m.model_id,
    m.embedder_digest,
    m.images_expected,
    m.completed_at,
    (SELECT count(*) FROM reference_embeddings AS e WHERE e.embedding_space = s.embedding_space) AS images,
    (SELECT count(*) FROM reference_failures AS f WHERE f.embedding_space = s.embedding_space) AS failures,
    EXISTS (SELECT FROM serving AS v WHERE v.embedding_space = s.embedding_space) AS live
FROM embedding_spaces AS s
LEFT JOIN space_embedders AS m USING (embedding_space)
ORDER BY s.embedding_space;

-- name: drop_embeddings
-- Delete the vectors of space $1.
DELETE FROM reference_embeddings WHERE embedding_space = $1;

-- name: drop_embedder
-- Forget what filled space $1, and what it failed at; says whether there was anything.
WITH failures AS (DELETE FROM reference_failures WHERE embedding_space = $1 RETURNING isic_id),
embedders AS (DELETE FROM space_embedders WHERE embedding_space = $1 RETURNING model_id)
SELECT EXISTS (SELECT FROM failures) OR EXISTS (SELECT FROM embedders);

-- name: drop_unused_images
-- Delete the images that no space holds any more, and with them their pictures.
DELETE FROM reference_images AS r
WHERE NOT EXISTS (SELECT FROM reference_embeddings AS e WHERE e.isic_id = r.isic_id);

-- name: drop_index_statements
-- Write the statements that drop the indexes of space $1.
SELECT format('DROP INDEX %I', indexrelid::regclass::text)
FROM pg_index
WHERE indrelid = 'reference_embeddings'::regclass
    AND indexrelid::regclass::text LIKE 'reference\_hnsw\_' || left(md5($1), 16) || '\_%';

-- name: picture
-- The picture of image $1, and what must be said of it.
SELECT p.jpeg, p.sha256, r.copyright_license, r.attribution
FROM reference_images AS r
LEFT JOIN reference_pictures AS p USING (isic_id)
WHERE r.isic_id = $1;
