-- The image of this data key is in the database.
DELETE FROM awaited_keys
WHERE data_key_id = :data_key_id;
