-- name: open_store
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

-- Which key-encryption keys this store belongs to, settled before the first data key: see KeyChecks.
CREATE TABLE IF NOT EXISTS key_checks (
    key_version INTEGER PRIMARY KEY,
    wrapped     BLOB    NOT NULL
);

-- Versions of the key-encryption key that are destroyed, or about to be. What one of them wrapped is lost: nothing is
-- kept under it any more, however long ago it was wrapped, whichever process comes with it, and whatever its version.
CREATE TABLE IF NOT EXISTS retired_versions (
    key_version INTEGER PRIMARY KEY,
    retired_at  TEXT    NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TRIGGER IF NOT EXISTS no_data_key_under_a_retired_version
BEFORE INSERT ON data_keys WHEN new.key_version IN (SELECT key_version FROM retired_versions)
BEGIN
    SELECT RAISE(ABORT, 'retired');
END;
CREATE TRIGGER IF NOT EXISTS no_rewrapping_under_a_retired_version
BEFORE UPDATE OF key_version ON data_keys WHEN new.key_version IN (SELECT key_version FROM retired_versions)
BEGIN
    SELECT RAISE(ABORT, 'retired');
END;

-- Data keys whose image has not been seen in the database yet: most are of uploads that failed.
CREATE TABLE IF NOT EXISTS awaited_keys (
    data_key_id BLOB PRIMARY KEY CHECK (length(data_key_id) = 16)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS data_keys_awaited_no_more
AFTER DELETE ON data_keys
BEGIN
    DELETE FROM awaited_keys WHERE data_key_id = old.data_key_id;
END;

-- The id by which a database knows this key store; a backup of it has the same.
CREATE TABLE IF NOT EXISTS identity (
    single   INTEGER PRIMARY KEY CHECK (single = 1),
    store_id BLOB    NOT NULL CHECK (length(store_id) = 16)
);

-- name: select_identity
-- This key store's own id.
SELECT store_id FROM identity;

-- name: insert_identity
-- Give a new key store its id; whoever was first stays.
INSERT INTO identity (single, store_id) VALUES (1, :store_id) ON CONFLICT (single) DO NOTHING;

-- name: select_data_key
-- The wrapped data key of this id.
SELECT wrapped, key_version FROM data_keys WHERE data_key_id = :data_key_id;

-- name: insert_data_key
-- Keep a new wrapped data key.
INSERT INTO data_keys (data_key_id, wrapped, key_version) VALUES (:data_key_id, :wrapped, :key_version);

-- name: delete_data_key
-- Remove this data key.
DELETE FROM data_keys WHERE data_key_id = :data_key_id;

-- name: select_stale
-- Data keys that another version of the key-encryption key than the current one wrapped, oldest first.
SELECT data_key_id, wrapped, key_version FROM data_keys WHERE key_version <> :current ORDER BY sequence LIMIT :limit;

-- name: replace_wrapped
-- Put a data key's new wrapping in place of the one that was read; a key shredded meanwhile stays gone.
UPDATE data_keys SET wrapped = :wrapped, key_version = :key_version
WHERE data_key_id = :data_key_id AND key_version = :old_version;

-- name: count_wrap
-- One more wrap by this key version; the table's check fails when it has had its share.
INSERT INTO wrap_counts (key_version, wraps) VALUES (:key_version, 1)
ON CONFLICT (key_version) DO UPDATE SET wraps = wraps + 1;

-- name: count_versions
-- How many data keys each version of the key-encryption key wraps now, and how often it has wrapped.
SELECT c.key_version, c.wraps, count(k.sequence)
FROM wrap_counts AS c LEFT JOIN data_keys AS k USING (key_version)
GROUP BY c.key_version ORDER BY c.key_version;

-- name: insert_retired_version
-- Retire a version, unless a data key is under it; one that is retired stays so. Takes the write lock before it counts.
INSERT INTO retired_versions (key_version)
SELECT :key_version WHERE NOT EXISTS (SELECT 1 FROM data_keys WHERE key_version = :key_version)
ON CONFLICT (key_version) DO NOTHING;

-- name: count_data_keys
-- How many data keys are under this version.
SELECT count(*) FROM data_keys WHERE key_version = :key_version;

-- name: select_newest
-- The data key made last.
SELECT data_key_id, wrapped, key_version FROM data_keys ORDER BY sequence DESC LIMIT 1;

-- name: select_key_checks
-- What the key-encryption keys of this store are known by: a known constant, wrapped under each version.
SELECT key_version, wrapped FROM key_checks;

-- name: insert_key_check
-- Remember what a version of the key-encryption key made of the constant; whoever was first stays.
INSERT INTO key_checks (key_version, wrapped) VALUES (:key_version, :wrapped) ON CONFLICT (key_version) DO NOTHING;

-- name: insert_awaited_key
-- Wait for the image of a new data key to be seen in the database.
INSERT INTO awaited_keys (data_key_id) VALUES (:data_key_id);

-- name: select_awaited_keys
-- Data keys whose image has not been seen yet, in the order of their ids, from behind one on.
SELECT data_key_id FROM awaited_keys WHERE data_key_id > :after ORDER BY data_key_id LIMIT :limit;

-- name: delete_awaited_key
-- The image of this data key is in the database.
DELETE FROM awaited_keys WHERE data_key_id = :data_key_id;

-- name: select_old_keys
-- Data keys that were made at least so long ago, oldest first, from behind a sequence number on, and whether their image was never seen.
SELECT d.sequence, d.data_key_id, a.data_key_id IS NOT NULL
FROM data_keys AS d LEFT JOIN awaited_keys AS a USING (data_key_id)
WHERE d.sequence > :after AND d.created_at <= datetime('now', :age)
ORDER BY d.sequence LIMIT :limit;

-- name: insert_destroyed_key
-- Remember that this data key was destroyed with its image, by whom and why.
INSERT INTO destroyed_keys (data_key_id, receipt_id, reason, actor)
VALUES (:data_key_id, :receipt_id, :reason, :actor) ON CONFLICT (data_key_id) DO NOTHING;

-- name: select_destroyed_key
-- Whether this data key was destroyed with its image.
SELECT 1 FROM destroyed_keys WHERE data_key_id = :data_key_id;

-- name: select_destroyed_keys
-- Data keys that were destroyed with their images, in that order, from behind a sequence number on.
SELECT sequence, data_key_id, receipt_id, reason, actor
FROM destroyed_keys WHERE sequence > :after ORDER BY sequence LIMIT :limit;

-- name: empty_log
-- Move the write-ahead log into the file and empty it; the first column is 1 when a reader was in the way.
PRAGMA wal_checkpoint(TRUNCATE);
