-- A site's own operating points: set by a command after the site's own validation, never by a request.

CREATE TABLE site_operating_points (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    set_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    model_id text NOT NULL,
    model_digest text NOT NULL,
    operating_points jsonb NOT NULL CHECK (jsonb_typeof(operating_points) = 'object'),
    approved_by text NOT NULL CHECK (approved_by <> ''),
    reason text NOT NULL CHECK (reason <> ''),
    report_sha256 text CHECK (report_sha256 ~ '^[0-9a-f]{64}$'),
    CHECK (operating_points = '{}' OR report_sha256 IS NOT NULL),
    FOREIGN KEY (model_id, model_digest) REFERENCES models (model_id, model_digest)
);
COMMENT ON TABLE site_operating_points IS
'Thresholds that stand in for those of a model''s manifest while it answers; its newest row counts. Added to, read, never changed.';
COMMENT ON COLUMN site_operating_points.operating_points IS
'Probabilities by the names of the manifest; none: the model''s own again.';
COMMENT ON COLUMN site_operating_points.report_sha256 IS 'SHA-256 of the report of the site''s validation.';

CREATE FUNCTION refuse_operating_point_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'site_operating_points is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;
CREATE TRIGGER site_operating_points_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON site_operating_points
FOR EACH STATEMENT EXECUTE FUNCTION refuse_operating_point_change();
