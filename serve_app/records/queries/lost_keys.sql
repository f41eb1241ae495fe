-- name: has_table
-- Whether this database has this table: before the first start, and before an update, it has not.
SELECT to_regclass($1::text) IS NOT NULL;

-- name: sealed_images
-- Data keys of the oldest and of the newest images that a key is needed for, up to $1 of each.
(SELECT data_key_id FROM lesion_images WHERE sealed IS NOT NULL ORDER BY image_id LIMIT $1)
UNION
(SELECT data_key_id FROM lesion_images WHERE sealed IS NOT NULL ORDER BY image_id DESC LIMIT $1);

-- name: key_store
-- The key store that this database belongs to.
SELECT store_id FROM key_stores;

-- name: claim
-- Let a database that belongs to no key store yet belong to this one.
INSERT INTO key_stores (store_id) VALUES ($1) ON CONFLICT (single) DO NOTHING;
