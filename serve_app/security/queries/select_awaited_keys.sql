-- Data keys whose image has not been seen yet, in the order of their ids, from behind one on.
SELECT data_key_id
FROM awaited_keys
WHERE data_key_id > :after
ORDER BY data_key_id
LIMIT :limit;
