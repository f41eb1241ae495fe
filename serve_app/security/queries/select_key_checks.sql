-- What the key-encryption keys of this store are known by: a known constant, wrapped under each version.
SELECT key_version, wrapped
FROM key_checks;
