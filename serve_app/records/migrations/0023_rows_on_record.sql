-- What the audit log says of the rows beside it is held against them, and its seals have no gaps.

-- In the digest of a row, which the audit log holds: without it nobody guesses a birth date or a reason from that.
ALTER TABLE emergency_accesses ADD COLUMN salt uuid NOT NULL DEFAULT gen_random_uuid();
ALTER TABLE legal_holds ADD COLUMN salt uuid NOT NULL DEFAULT gen_random_uuid();
ALTER TABLE patient_records ADD COLUMN salt uuid NOT NULL DEFAULT gen_random_uuid();
COMMENT ON COLUMN emergency_accesses.salt IS 'Random; in the digest of the row that the audit log holds.';
COMMENT ON COLUMN legal_holds.salt IS 'Random; in the digest of the row that the audit log holds.';
COMMENT ON COLUMN patient_records.salt IS 'Random; in the digest of the row that the audit log holds.';

-- One seal at a position far ahead would be the last one for ever.
ALTER TABLE audit_seals
ADD COLUMN follows bigint GENERATED ALWAYS AS (nullif(position - 1, 0)) STORED REFERENCES audit_seals (position);
COMMENT ON COLUMN audit_seals.follows IS 'The position before, which is there; null for the first.';
