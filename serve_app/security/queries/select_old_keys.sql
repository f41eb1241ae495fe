-- Data keys that were made at least so long ago, oldest first, from behind a sequence number on, and whether their image was never seen.
SELECT d.sequence, d.data_key_id, a.data_key_id IS NOT NULL
FROM data_keys AS d
LEFT JOIN awaited_keys AS a USING (data_key_id)
WHERE d.sequence > :after AND d.created_at <= datetime('now', :age)
ORDER BY d.sequence
LIMIT :limit;
