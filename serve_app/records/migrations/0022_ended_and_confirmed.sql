-- An emergency access that is judged unjustified ends; nothing is sent to an encounter before the PMS has confirmed it.

ALTER TABLE emergency_accesses ADD COLUMN ended_at timestamptz;
ALTER TABLE emergency_accesses ADD COLUMN ended_by text CHECK (ended_by <> '');
UPDATE emergency_accesses
SET ended_at = least(now(), ends_at), ended_by = reviewer
WHERE review_outcome = 'not_justified' AND reviewed_at < ends_at;
ALTER TABLE emergency_accesses ADD CONSTRAINT emergency_accesses_ended
CHECK ((ended_at IS NULL) = (ended_by IS NULL));
ALTER TABLE emergency_accesses ADD CONSTRAINT emergency_accesses_unjustified_end
CHECK (review_outcome <> 'not_justified' OR ended_at IS NOT NULL OR reviewed_at >= ends_at);
COMMENT ON COLUMN emergency_accesses.ended_at IS
'When it was ended before its time, by a review or a command; it never begins again.';

CREATE FUNCTION refuse_emergency_revival() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'an emergency access that was ended stays so' USING ERRCODE = 'insufficient_privilege';
END;
$$;
CREATE TRIGGER emergency_accesses_stay_ended BEFORE UPDATE ON emergency_accesses
FOR EACH ROW WHEN (OLD.ended_at IS NOT NULL AND (NEW.ended_at, NEW.ended_by) IS DISTINCT FROM (OLD.ended_at, OLD.ended_by))
EXECUTE FUNCTION refuse_emergency_revival();

ALTER TABLE outbox ADD COLUMN sent_at timestamptz;
UPDATE outbox AS o SET sent_at = told.first_at
FROM (
    SELECT assessment_id, min(recorded_at) AS first_at FROM audit_events WHERE action = 'disclose' GROUP BY assessment_id
) AS told
WHERE told.assessment_id = o.assessment_id;
COMMENT ON COLUMN outbox.sent_at IS
'When it was first sent, the PMS having confirmed that the encounter is the patient''s; before that the PMS knows nothing of it.';
