-- Whether this data key was destroyed with its image.
SELECT 1
FROM destroyed_keys
WHERE data_key_id = :data_key_id;
