-- name: live_model
-- Say which model answers.
SELECT model_id, model_digest, embedding_space FROM serving;

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
SET
    model_id = excluded.model_id,
    model_digest = excluded.model_digest,
    embedding_space = excluded.embedding_space,
    served_since = now();

-- name: record_publication
-- Note who let the model answer, why, and what that takes back; the entry's number comes back.
INSERT INTO publications (
    action, model_id, model_digest, embedding_space, approved_by, reason, report_sha256, takes_back
) VALUES ($4, $1, $2, $3, $5, $6, $7, $8)
RETURNING publication_id;

-- name: publications
-- List the last $1 publications, newest first; with $2 only those that stand: rollbacks and what they took back are left out.
SELECT
    publication_id,
    published_at,
    action,
    model_id,
    model_digest,
    embedding_space,
    approved_by,
    reason,
    report_sha256,
    takes_back
FROM publications AS made
WHERE NOT $2
    OR (
        action <> 'rollback'
        AND NOT EXISTS (SELECT FROM publications AS back WHERE back.takes_back = made.publication_id)
    )
ORDER BY publication_id DESC
LIMIT $1;
