-- One more wrap by this key version; the table's check fails when it has had its share.
INSERT INTO wrap_counts (key_version, wraps)
VALUES (:key_version, 1)
ON CONFLICT (key_version) DO UPDATE SET wraps = wraps + 1;
