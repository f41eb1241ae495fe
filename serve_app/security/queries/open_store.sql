-- The key store: one wrapped data key for each sealed image, and how often each KEK has wrapped.

PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;     -- a commit is on disk before it returns
PRAGMA secure_delete = ON;     -- what is deleted is overwritten with zeros

CREATE TABLE IF NOT EXISTS data_keys (
    sequence    INTEGER PRIMARY KEY,
    data_key_id BLOB    NOT NULL UNIQUE CHECK (length(data_key_id) = 16),
    wrapped     BLOB    NOT NULL,
    key_version INTEGER NOT NULL,
    created_at  TEXT    NOT NULL DEFAULT CURRENT_TIMESTAMP
);

-- What a restored database must not bring back: it has its images again, and not their erasures.
CREATE TABLE IF NOT EXISTS destroyed_keys (
    sequence     INTEGER PRIMARY KEY,
    data_key_id  BLOB    NOT NULL UNIQUE CHECK (length(data_key_id) = 16),
    receipt_id   BLOB    NOT NULL CHECK (length(receipt_id) = 16),
    reason       TEXT    NOT NULL,
    actor        TEXT    NOT NULL,
    destroyed_at TEXT    NOT NULL DEFAULT CURRENT_TIMESTAMP
);

-- NIST SP 800-38D (8.3) allows one key 2^32 encryptions under random nonces. Half of it, so
-- that the wraps this check turns down stay within it, too.
CREATE TABLE IF NOT EXISTS wrap_counts (
    key_version INTEGER PRIMARY KEY,
    wraps       INTEGER NOT NULL CHECK (wraps <= 2147483648)
);

-- Whose store this is, settled before the first data key: see key_checks.py.
CREATE TABLE IF NOT EXISTS key_checks (
    key_version INTEGER PRIMARY KEY,
    wrapped     BLOB    NOT NULL
);

-- Data keys whose image has not been seen in the database yet: most are of uploads that failed.
CREATE TABLE IF NOT EXISTS awaited_keys (
    data_key_id BLOB PRIMARY KEY CHECK (length(data_key_id) = 16)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS data_keys_awaited_no_more
AFTER DELETE ON data_keys
BEGIN
    DELETE FROM awaited_keys WHERE data_key_id = old.data_key_id;
END;
