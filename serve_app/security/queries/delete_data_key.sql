-- Remove this data key.
DELETE FROM data_keys
WHERE data_key_id = :data_key_id;
