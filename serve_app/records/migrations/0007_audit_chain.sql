-- The audit log's chain: each seal holds the hash of its event and of the seal before.

CREATE TABLE audit_seals (
    position bigint PRIMARY KEY CHECK (position > 0),
    event_id bigint NOT NULL UNIQUE REFERENCES audit_events,
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    sealed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE audit_seals IS
'Added moments after their events, in one order, by one sealer at a time; added to, read, and never changed.';
COMMENT ON COLUMN audit_seals.hash IS
'SHA-256 of the hash before (32 zero bytes at first), the position (8 bytes, big-endian) and the SHA-256 of the event.';

CREATE FUNCTION refuse_seal_change() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION 'audit_seals is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;

CREATE TRIGGER audit_seals_append_only
BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_seals
FOR EACH STATEMENT EXECUTE FUNCTION refuse_seal_change();

-- One form of an event, for ever: fields added to audit_events later need a function of their own.
CREATE FUNCTION audit_digest(e audit_events) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN sha256(convert_to(
    jsonb_build_array(
        (e).event_id, extract(epoch FROM (e).recorded_at), (e).action, (e).actor, (e).outcome, (e).patient_id,
        (e).lesion_id, (e).image_id, (e).assessment_id, (e).request_id, (e).detail
    )::text,
    'UTF8'
));
COMMENT ON FUNCTION audit_digest IS
'SHA-256 of an event: its fields in order, as JSON.';
