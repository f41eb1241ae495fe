-- Every change of the model that answers: when, by whom and why, and the evidence it rests on.

CREATE TABLE publications (
    publication_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    action text NOT NULL CHECK (action IN ('publish', 'promote', 'rollback')),
    model_id text NOT NULL,
    model_digest text NOT NULL,
    embedding_space text NOT NULL,
    approved_by text NOT NULL CHECK (approved_by <> ''),
    reason text NOT NULL CHECK (reason <> ''),
    report_sha256 text CHECK (report_sha256 ~ '^[0-9a-f]{64}$'),
    -- Unique: two rollbacks at once cannot both take back the same publication.
    takes_back bigint UNIQUE REFERENCES publications,
    CHECK ((action = 'rollback') = (takes_back IS NOT NULL)),
    FOREIGN KEY (model_id, model_digest, embedding_space)
    REFERENCES models (model_id, model_digest, embedding_space)
);
COMMENT ON TABLE publications IS
'History of `serving`, written in the same transaction; it is added to, read, and never changed.';
COMMENT ON COLUMN publications.report_sha256 IS
'SHA-256 of the promotion report that was accepted.';
COMMENT ON COLUMN publications.takes_back IS
'The publication that a rollback undid.';

INSERT INTO publications (published_at, action, model_id, model_digest, embedding_space, approved_by, reason)
SELECT served_since, 'publish', model_id, model_digest, embedding_space, 'derm-cds', 'answered before the history began'
FROM serving;

CREATE FUNCTION refuse_publication_change() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION 'publications is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END;
$$;

CREATE TRIGGER publications_append_only
BEFORE UPDATE OR DELETE OR TRUNCATE ON publications
FOR EACH STATEMENT EXECUTE FUNCTION refuse_publication_change();
