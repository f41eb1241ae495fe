-- Put a data key's new wrapping in place of the one that was read; a key shredded meanwhile stays gone.
UPDATE data_keys
SET wrapped = :wrapped, key_version = :key_version
WHERE data_key_id = :data_key_id AND key_version = :old_version;
