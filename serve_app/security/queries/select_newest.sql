-- The data key made last.
SELECT data_key_id, wrapped, key_version
FROM data_keys
ORDER BY sequence DESC
LIMIT 1;
