-- name: live_model
-- Say which model answers, and which of its operating points the site has set.
SELECT model_id, model_digest, embedding_space, coalesce((
    SELECT site.operating_points FROM site_operating_points AS site
    WHERE site.model_id = serving.model_id AND site.model_digest = serving.model_digest
    ORDER BY site.id DESC
    LIMIT 1
), '{}') AS operating_points
FROM serving;

-- name: set_operating_points
-- Put a site's thresholds ($3, none for the model's own) in the place of those of model $1 of digest $2.
INSERT INTO site_operating_points (model_id, model_digest, operating_points, approved_by, reason, report_sha256)
VALUES ($1, $2, $3, $4, $5, $6)
RETURNING *;

-- name: operating_points_then
-- List what a site has ever set for model $1 of digest $2.
SELECT DISTINCT operating_points FROM site_operating_points WHERE model_id = $1 AND model_digest = $2;

-- name: lock_serving
-- Let nobody else change which model answers, until this transaction ends ("dermserv" in ASCII).
-- A lock on the row would not do: before the first publication there is none.
SELECT pg_advisory_xact_lock(7234314190853599862);

-- name: publish
-- Make a model the one that answers, from the next request on.
WITH space AS (
    INSERT INTO embedding_spaces (embedding_space) VALUES ($3)
    ON CONFLICT DO NOTHING
),
model AS (
    INSERT INTO models (model_id, model_digest, embedding_space) VALUES ($1, $2, $3)
    ON CONFLICT DO NOTHING
)
INSERT INTO serving (model_id, model_digest, embedding_space) VALUES ($1, $2, $3)
ON CONFLICT (only_row) DO UPDATE
SET model_id = excluded.model_id, model_digest = excluded.model_digest,
    embedding_space = excluded.embedding_space, served_since = now();

-- name: record_publication
-- Note who let the model answer, why, and what that takes back; the entry's number comes back.
INSERT INTO publications (
    action, model_id, model_digest, embedding_space, approved_by, reason, report_sha256, takes_back
) VALUES ($4, $1, $2, $3, $5, $6, $7, $8)
RETURNING publication_id;

-- name: publications
-- List the last $1 publications, newest first; with $2 only those that stand: rollbacks and what they took back are left out.
SELECT * FROM publications AS made
WHERE NOT $2
    OR (
        action <> 'rollback'
        AND NOT EXISTS (SELECT FROM publications AS back WHERE back.takes_back = made.publication_id)
    )
ORDER BY publication_id DESC
LIMIT $1;

-- name: announce
-- Have every replica make a model ready; an earlier announcement no longer holds. Rows of replicas long gone are let go of.
WITH gone AS (
    DELETE FROM serving_replicas WHERE seen_at < now() - interval '1 day'
)
INSERT INTO serving_candidate (announcement, model_id, model_digest, embedding_space)
VALUES (gen_random_uuid(), $1, $2, $3)
ON CONFLICT (only_row) DO UPDATE
SET announcement = excluded.announcement, model_id = excluded.model_id, model_digest = excluded.model_digest,
    embedding_space = excluded.embedding_space, announced_at = excluded.announced_at
RETURNING announcement;

-- name: announced
-- Say which model is to be made ready. Whoever announced it waits for minutes, so what is older was left by one that was killed.
SELECT announcement, model_id, model_digest, embedding_space
FROM serving_candidate
WHERE announced_at > now() - interval '10 minutes';

-- name: withdraw
-- The announcement is done with.
DELETE FROM serving_candidate WHERE announcement = $1;

-- name: report_replica
-- An ingress replica is up, and this is what it has ready.
INSERT INTO serving_replicas (replica_id, seen_at, ready, fault) VALUES ($1, now(), $2, $3)
ON CONFLICT (replica_id) DO UPDATE
SET seen_at = excluded.seen_at, ready = excluded.ready, fault = excluded.fault;

-- name: forget_replica
-- An ingress replica stops.
DELETE FROM serving_replicas WHERE replica_id = $1;

-- name: readiness
-- Count the ingress replicas that are up ($2: seconds since they were last seen) and those that have announcement $1 ready,
-- with what one of the others says, and whether the announcement still holds.
SELECT
    count(*) AS running,
    count(*) FILTER (WHERE ready = $1) AS ready,
    max(fault) FILTER (WHERE ready IS DISTINCT FROM $1) AS fault,
    EXISTS (SELECT FROM serving_candidate WHERE announcement = $1) AS holds
FROM serving_replicas
WHERE seen_at > now() - make_interval(secs => $2);
