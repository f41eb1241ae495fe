-- Wait for the image of a new data key to be seen in the database.
INSERT INTO awaited_keys (data_key_id)
VALUES (:data_key_id);
