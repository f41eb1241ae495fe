-- Access beside care assignments: who is locked out, and who went in without an assignment.

CREATE TABLE revocations (
    kind text NOT NULL CHECK (kind IN ('subject', 'token')),
    value text NOT NULL CHECK (value <> ''),
    revoked_at timestamptz NOT NULL DEFAULT now(),
    revoked_by text NOT NULL CHECK (revoked_by <> ''),
    PRIMARY KEY (kind, value)
);
COMMENT ON TABLE revocations IS
'Subjects (`sub`) and single tokens (`jti`) that are refused from their next request on.';

CREATE TABLE emergency_accesses (
    emergency_id uuid PRIMARY KEY,
    patient_id text NOT NULL CHECK (patient_id <> ''),
    principal text NOT NULL CHECK (principal <> ''),
    reason text NOT NULL CHECK (char_length(reason) BETWEEN 10 AND 1000),
    starts_at timestamptz NOT NULL DEFAULT now(),
    ends_at timestamptz NOT NULL CHECK (ends_at > starts_at),
    reviewed_at timestamptz,
    reviewer text CHECK (reviewer <> principal),
    review_outcome text CHECK (review_outcome IN ('justified', 'not_justified', 'follow_up')),
    review_note text CHECK (char_length(review_note) <= 1000),
    CHECK (num_nonnulls(reviewed_at, reviewer, review_outcome) IN (0, 3))
);
CREATE INDEX emergency_accesses_of_principal ON emergency_accesses (principal, patient_id, ends_at);
CREATE INDEX emergency_accesses_unreviewed ON emergency_accesses (emergency_id) WHERE reviewed_at IS NULL;
COMMENT ON TABLE emergency_accesses IS
'Break-glass: a principal gave itself the rights of a care assignment for a time, and somebody else reviews that.';
COMMENT ON COLUMN emergency_accesses.reason IS
'In the principal''s own words; may speak of the patient, so it is here and never in the audit log.';

-- What a reviewer asks: what was done under this emergency access.
CREATE INDEX audit_events_of_emergency ON audit_events ((detail ->> 'emergency_access'))
WHERE detail ? 'emergency_access';
