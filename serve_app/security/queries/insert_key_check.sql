-- Remember what a version of the key-encryption key made of the constant; whoever was first stays.
INSERT INTO key_checks (key_version, wrapped)
VALUES (:key_version, :wrapped)
ON CONFLICT (key_version) DO NOTHING;
