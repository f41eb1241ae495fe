-- Remember that this data key was destroyed with its image, by whom and why.
INSERT INTO destroyed_keys (data_key_id, receipt_id, reason, actor)
VALUES (:data_key_id, :receipt_id, :reason, :actor)
ON CONFLICT (data_key_id) DO NOTHING;
