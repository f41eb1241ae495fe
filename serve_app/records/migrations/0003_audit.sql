-- The audit log: added to, read, and never changed.

CREATE TABLE audit_events (
    event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    action text NOT NULL CHECK (action <> ''),
    actor text NOT NULL,
    outcome text NOT NULL CHECK (outcome IN ('success', 'denied', 'failed')),
    patient_id text,
    -- Without foreign keys: a denied request names what does not exist, and events outlive what they tell of.
    lesion_id uuid,
    image_id uuid,
    assessment_id uuid,
    request_id text NOT NULL,
    detail jsonb NOT NULL
);
COMMENT ON TABLE audit_events IS
'Who did what to whose record, and whether they were let; the application may only add and read.';

CREATE FUNCTION refuse_audit_change() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION 'audit_events is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;

CREATE TRIGGER audit_events_append_only
BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change();
