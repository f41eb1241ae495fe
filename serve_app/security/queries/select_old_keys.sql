-- Data keys that were made at least so long ago, oldest first, from behind a sequence number on.
SELECT sequence, data_key_id
FROM data_keys
WHERE sequence > :after AND created_at <= datetime('now', :age)
ORDER BY sequence
LIMIT :limit;
