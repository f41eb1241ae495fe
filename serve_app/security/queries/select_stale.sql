-- Data keys that another version of the key-encryption key than the current one wrapped, oldest first.
SELECT data_key_id, wrapped, key_version
FROM data_keys
WHERE key_version <> :current
ORDER BY sequence
LIMIT :limit;
