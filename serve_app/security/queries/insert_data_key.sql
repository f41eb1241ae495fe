-- Keep a new wrapped data key.
INSERT INTO data_keys (data_key_id, wrapped, key_version)
VALUES (:data_key_id, :wrapped, :key_version);
