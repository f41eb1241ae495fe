-- CDS Hooks: whom an EHR means, the cards that it was given, what became of them there, and tokens that were taken.

CREATE TABLE hook_identities (
    client text NOT NULL CHECK (client <> ''),
    kind text NOT NULL CHECK (kind IN ('user', 'patient')),
    fhir_id text NOT NULL CHECK (fhir_id <> ''),
    own_id text NOT NULL CHECK (own_id <> ''),
    mapped_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    mapped_by text NOT NULL CHECK (mapped_by <> ''),
    PRIMARY KEY (client, kind, fhir_id)
);
COMMENT ON TABLE hook_identities IS
'Which clinician (subject of the token) or patient of ours an EHR means by an id of its own: set by a command, never by a request.';

CREATE TABLE hook_cards (
    card_id uuid PRIMARY KEY,
    client text NOT NULL CHECK (client <> ''),
    kind text NOT NULL CHECK (kind IN ('open_demand', 'follow_up')),
    assessment_id uuid NOT NULL REFERENCES assessments,
    review_id uuid REFERENCES reviews,
    first_shown_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((review_id IS NOT NULL) = (kind = 'follow_up'))
);
CREATE INDEX hook_cards_of_assessment ON hook_cards (assessment_id);
COMMENT ON TABLE hook_cards IS
'Cards that an EHR was given: the id is made of the EHR and of what the card is about, so that late feedback finds it.';

CREATE TABLE hook_feedback (
    feedback_id uuid PRIMARY KEY,
    card_id uuid NOT NULL REFERENCES hook_cards,
    outcome text NOT NULL CHECK (outcome IN ('accepted', 'overridden')),
    reason_system text CHECK (char_length(reason_system) BETWEEN 1 AND 200),
    reason_code text CHECK (char_length(reason_code) BETWEEN 1 AND 100),
    comment text CHECK (char_length(comment) BETWEEN 1 AND 4000),
    outcome_at timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- An EHR that is not sure whether it was heard tells it again.
    UNIQUE (card_id, outcome, outcome_at)
);
COMMENT ON TABLE hook_feedback IS
'What became of a card in the EHR, as the EHR says: no review, and closes no demand. Added to, never changed but for the comment, which goes with the image.';

CREATE TRIGGER hook_feedback_append_only BEFORE DELETE OR TRUNCATE ON hook_feedback
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER hook_feedback_loses_its_comment_alone BEFORE UPDATE ON hook_feedback
FOR EACH ROW WHEN (NEW.comment IS NOT NULL OR to_jsonb(NEW) - 'comment' IS DISTINCT FROM to_jsonb(OLD) - 'comment')
EXECUTE FUNCTION refuse_change();

-- On the assessment, whose row feedback locks: whichever comes second, erasure or feedback, knows of the other.
CREATE FUNCTION erase_feedback_comments() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE hook_feedback AS f SET comment = NULL
    FROM hook_cards AS c
    WHERE c.card_id = f.card_id AND c.assessment_id = NEW.assessment_id AND f.comment IS NOT NULL;
    RETURN NULL;
END;
$$;
CREATE TRIGGER assessments_erase_feedback_comments AFTER UPDATE OF outcome ON assessments
FOR EACH ROW WHEN (NEW.outcome IN ('erased', 'cancelled'))
EXECUTE FUNCTION erase_feedback_comments();

CREATE TABLE hook_tokens (
    client text NOT NULL,
    jti_sha256 bytea NOT NULL CHECK (octet_length(jti_sha256) = 32),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (client, jti_sha256)
);
CREATE INDEX hook_tokens_by_age ON hook_tokens (seen_at);
COMMENT ON TABLE hook_tokens IS
'Tokens of EHRs that were taken, for longer than one is valid: each is good for one request, at whichever replica.';
