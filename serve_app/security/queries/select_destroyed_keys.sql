-- Data keys that were destroyed with their images, in that order, from behind a sequence number on.
SELECT sequence, data_key_id, receipt_id, reason, actor
FROM destroyed_keys
WHERE sequence > :after
ORDER BY sequence
LIMIT :limit;
