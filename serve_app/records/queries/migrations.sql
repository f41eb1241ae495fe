-- name: make_ledger
-- Make the table of applied migrations, the first of all tables.
CREATE TABLE IF NOT EXISTS schema_migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    sha256 bytea NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE schema_migrations IS 'Which migrations made this schema, and the digest of each file.';

-- name: has_ledger
-- Say whether anything was ever applied.
SELECT to_regclass('schema_migrations') IS NOT NULL;

-- name: lock
-- Wait until no other process migrates this database; the session's end lets go ("dermmigr" in ASCII).
SELECT pg_advisory_lock(7234309766869477234);

-- name: applied
-- List what has been applied, in order.
SELECT version, name, sha256 FROM schema_migrations ORDER BY version;

-- name: record
-- Note a migration as applied, in its own transaction.
INSERT INTO schema_migrations (version, name, sha256) VALUES ($1, $2, $3);

-- name: find_role
-- Find a role: its quoted name, and whether it is the one that migrates.
SELECT quote_ident(rolname) AS role, rolname = current_user AS migrates FROM pg_roles WHERE rolname = $1;

-- name: grant
-- Give the application role what serving needs and no more; {role} is filled in, quoted.
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role};
GRANT USAGE ON SCHEMA public TO {role};
GRANT SELECT ON schema_migrations, embedding_spaces, models, serving, publications, serving_candidate, space_embedders,
    reference_images, reference_embeddings, reference_counts, reference_pictures, reference_failures, care_assignments,
    site_operating_points, revocations, erasures, legal_holds, closed_records, patient_records, patient_encounters TO {role};
GRANT SELECT, INSERT ON lesions, lesion_images, lesion_embeddings, idempotency_keys, audit_events, audit_seals, outbox,
    emergency_accesses, erasure_receipts, condemned_data_keys, key_stores TO {role};
GRANT SELECT, INSERT, UPDATE ON assessments TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON serving_replicas TO {role};
GRANT DELETE ON idempotency_keys TO {role};
GRANT UPDATE (reviewed_at, reviewer, review_outcome, review_note, ended_at, ended_by) ON emergency_accesses TO {role};
GRANT UPDATE (attempts, queued_at, due_at, lease_until, last_error, waiting_since, sent_at, delivered_at, dead_at,
    setbacks, set_back_at) ON outbox TO {role};
GRANT EXECUTE ON FUNCTION erase_image TO {role};
