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
GRANT SELECT ON audit_events, audit_seals, outbox, emergency_accesses, assessments, lesion_images, condemned_data_keys,
    key_stores TO {role};
GRANT SELECT ON reviews, lesion_outcomes, lesion_links, lesion_heads, report_queue, assessment_facts, report_cells, report_snapshots TO {role};
GRANT SELECT ON answered_images, drift_streams, drift_alarms TO {role};
GRANT SELECT ON hook_identities, hook_cards, hook_feedback, hook_tokens TO {role};
GRANT INSERT (card_id, client, kind, assessment_id, review_id) ON hook_cards TO {role};
GRANT INSERT (feedback_id, card_id, outcome, reason_system, reason_code, comment, outcome_at) ON hook_feedback TO {role};
GRANT INSERT (client, jti_sha256), DELETE ON hook_tokens TO {role};
GRANT SELECT, INSERT ON lesions, lesion_embeddings, idempotency_keys, erasure_receipts TO {role};
-- By column: numbers and times are the database's to give, and what comes later (an erasure, a review) is not there at first.
GRANT INSERT (action, actor, outcome, patient_id, lesion_id, image_id, assessment_id, request_id, detail)
    ON audit_events TO {role};
GRANT INSERT (position, event_id, hash) ON audit_seals TO {role};
GRANT INSERT (message_id, assessment_id, encounter_id, kind, subject_id) ON outbox TO {role};
-- An impression alone, which may come with its upload, when the upload says; a decision is recorded by record_review.
GRANT INSERT (review_id, assessment_id, clinician, request_id, recorded_at, impression_diagnosis, intended_referral,
    before_answer, salt) ON reviews TO {role};
GRANT INSERT (outcome_id, lesion_id, image_id, kind, diagnosis, malignant, code, code_system, observed_on, source, recorded_by,
    request_id) ON lesion_outcomes TO {role};
GRANT INSERT (emergency_id, patient_id, principal, reason, ends_at) ON emergency_accesses TO {role};
GRANT INSERT (image_id, lesion_id, patient_id, encounter_id, created_at, content_type, width, height, data_key_id, sealed)
    ON lesion_images TO {role};
GRANT INSERT (data_key_id) ON condemned_data_keys TO {role};
GRANT INSERT (store_id) ON key_stores TO {role};
GRANT INSERT (assessment_id, image_id, created_at, outcome, context, top_k, licences, actor, request_id, confirmed_only,
    lease_until) ON assessments TO {role};
GRANT UPDATE (outcome, answer, failure, completed_at, demand_level, demand_urgency, lease_until, attempts, setbacks,
    set_back_at, confirmed_by, confirmed_at) ON assessments TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON serving_replicas TO {role};
GRANT DELETE ON idempotency_keys TO {role};
GRANT UPDATE (reviewed_at, reviewer, review_outcome, review_note, ended_at, ended_by) ON emergency_accesses TO {role};
GRANT UPDATE (attempts, queued_at, due_at, lease_until, last_error, waiting_since, sent_at, delivered_at, dead_at,
    setbacks, set_back_at) ON outbox TO {role};
GRANT INSERT (report_id, kind, period, document) ON report_snapshots TO {role};
-- Acknowledging an alarm and beginning again are the owner's.
GRANT INSERT (stream, subject, since), UPDATE (collected, baseline, baseline_until, newest, seen_until, looked_at)
    ON drift_streams TO {role};
GRANT INSERT (drift_id, measure, distance), UPDATE (ended_at) ON drift_alarms TO {role};
GRANT EXECUTE ON FUNCTION erase_image, record_review, link_lesion, unlink_lesion, count_reports TO {role};
