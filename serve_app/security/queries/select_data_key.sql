-- The wrapped data key of this id.
SELECT wrapped, key_version
FROM data_keys
WHERE data_key_id = :data_key_id;
