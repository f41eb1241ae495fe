-- name: claim_space
-- Say what fills space $1; what was said before stays, and comes back.
INSERT INTO space_embedders AS known (embedding_space, model_id, embedder_digest, preprocess_version, images_expected)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (embedding_space) DO UPDATE
SET
    images_expected = CASE
        WHEN known.embedder_digest = excluded.embedder_digest
            THEN greatest(known.images_expected, excluded.images_expected)
        ELSE known.images_expected
    END
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

-- name: begun
-- The job goes on: what it said it had completed is no longer so.
UPDATE space_embedders SET completed_at = NULL WHERE embedding_space = $1;

-- name: is_live
-- Whether the live model answers in space $1.
SELECT EXISTS (SELECT FROM serving WHERE embedding_space = $1);

-- name: present
-- Name the images of space $1; with $2, only those that have a picture too.
SELECT e.isic_id
FROM reference_embeddings AS e
WHERE e.embedding_space = $1
    AND (NOT $2 OR EXISTS (SELECT FROM reference_pictures AS p WHERE p.isic_id = e.isic_id));

-- name: count_present
-- Count what `present` names.
SELECT count(*)
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

-- name: drop_failures
-- Delete the failures of space $1.
DELETE FROM reference_failures WHERE embedding_space = $1;

-- name: drop_embedder
-- Forget what filled space $1.
DELETE FROM space_embedders WHERE embedding_space = $1;

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
