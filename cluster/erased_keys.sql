-- name: known
-- Whether this database has erasures at all: an older schema has none.
SELECT to_regclass('erasures') IS NOT NULL;

-- name: erased
-- Data keys of the images that were erased, whatever a restored key store holds.
SELECT data_key_id, receipt_id, reason, actor FROM erasures ORDER BY accepted_at;
