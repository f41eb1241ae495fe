-- name: live_model
-- Say which model answers.
SELECT model_id, model_digest, embedding_space FROM serving;

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
    served_since = now()
WHERE (serving.model_id, serving.model_digest, serving.embedding_space)
    IS DISTINCT FROM (excluded.model_id, excluded.model_digest, excluded.embedding_space);
