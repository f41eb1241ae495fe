-- name: sizes
-- Weigh the table of embeddings and its indexes, in bytes.
SELECT 'table' AS name, pg_table_size('reference_embeddings') AS bytes
UNION ALL
SELECT i.indexrelid::regclass::text, pg_relation_size(i.indexrelid)
FROM pg_index AS i
WHERE i.indrelid = 'reference_embeddings'::regclass
ORDER BY name;

-- name: shared_buffers
-- Tell how much memory the server caches pages in.
SELECT current_setting('shared_buffers');
