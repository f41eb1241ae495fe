-- name: known
-- Whether this database has this table: an older schema has not.
SELECT to_regclass($1::text) IS NOT NULL;

-- name: erased
-- Data keys of the images that were erased, whatever a restored key store holds; proven where there is a receipt.
SELECT e.data_key_id, e.receipt_id, e.reason, e.actor, r.receipt_id IS NOT NULL AS proven
FROM erasures AS e
LEFT JOIN erasure_receipts AS r USING (receipt_id)
ORDER BY e.accepted_at;

-- name: release
-- Let this database belong to no key store.
DELETE FROM key_stores;
