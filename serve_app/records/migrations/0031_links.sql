-- Lesions that a clinician says are one: a row that links them, and nothing moved. What was said is ended and never taken back.

CREATE TABLE lesion_links (
    link_id uuid PRIMARY KEY,
    lesion_id uuid NOT NULL,
    earlier_lesion_id uuid NOT NULL,
    -- With the patient, twice: two patients' lesions cannot be linked.
    patient_id text NOT NULL,
    reason text NOT NULL CHECK (reason <> ''),
    linked_by text NOT NULL CHECK (linked_by <> ''),
    linked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    request_id text NOT NULL,
    ended_by text CHECK (ended_by <> ''),
    ended_at timestamptz,
    end_reason text CHECK (end_reason <> ''),
    end_request_id text,
    -- The assessments whose demand was open for both when the link ended: open for either until a clinician has answered it.
    left_open uuid[] NOT NULL DEFAULT '{}',
    CONSTRAINT lesion_links_of_two CHECK (lesion_id <> earlier_lesion_id),
    CONSTRAINT lesion_links_ended CHECK (num_nonnulls(ended_by, ended_at, end_reason, end_request_id) IN (0, 4)),
    CONSTRAINT lesion_links_left_at_the_end CHECK (ended_at IS NOT NULL OR left_open = '{}'),
    FOREIGN KEY (lesion_id, patient_id) REFERENCES lesions (lesion_id, patient_id),
    FOREIGN KEY (earlier_lesion_id, patient_id) REFERENCES lesions (lesion_id, patient_id)
);
CREATE UNIQUE INDEX lesion_links_in_force ON lesion_links (lesion_id) WHERE ended_at IS NULL;
CREATE INDEX lesion_links_of_lesion ON lesion_links (lesion_id, linked_at);
CREATE INDEX lesion_links_of_earlier ON lesion_links (earlier_lesion_id, linked_at);
COMMENT ON TABLE lesion_links IS
'That a lesion is the same as an earlier one of the patient, as a clinician said, until it was ended; all of a lesion are linked to its first, so no link leads to another.';

CREATE TRIGGER lesion_links_append_only BEFORE DELETE OR TRUNCATE ON lesion_links
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER lesion_links_end_once BEFORE UPDATE ON lesion_links
FOR EACH ROW WHEN (
    OLD.ended_at IS NOT NULL
    OR NEW.ended_at IS NULL
    OR (to_jsonb(NEW) - '{ended_by,ended_at,end_reason,end_request_id,left_open}'::text [])
    IS DISTINCT FROM (to_jsonb(OLD) - '{ended_by,ended_at,end_reason,end_request_id,left_open}'::text [])
)
EXECUTE FUNCTION refuse_change();

CREATE VIEW lesion_heads AS
SELECT l.lesion_id, l.patient_id, l.created_at, coalesce(k.earlier_lesion_id, l.lesion_id) AS head
FROM lesions AS l
LEFT JOIN lesion_links AS k ON k.lesion_id = l.lesion_id AND k.ended_at IS NULL;
COMMENT ON VIEW lesion_heads IS 'Every lesion, and the first of those that are linked with it: itself where none is.';

CREATE FUNCTION same_lesions(of_lesion uuid, ever boolean DEFAULT false) RETURNS uuid []
LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH heads AS (
        SELECT of_lesion AS head
        UNION
        SELECT k.earlier_lesion_id FROM lesion_links AS k
        WHERE k.lesion_id = of_lesion AND (ever OR k.ended_at IS NULL)
    )
    SELECT array_agg(DISTINCT same.lesion_id)
    FROM (
        SELECT h.head AS lesion_id FROM heads AS h
        UNION ALL
        SELECT k.lesion_id FROM heads AS h
        INNER JOIN lesion_links AS k ON k.earlier_lesion_id = h.head AND (ever OR k.ended_at IS NULL)
    ) AS same;
END;
COMMENT ON FUNCTION same_lesions IS
'A lesion and all that are linked with it; `ever`: those, too, that once were, and may have been shown as one with it.';

-- Planned once a session: to plan it for each lesion of a list anew takes ten times as long as to run it.
CREATE FUNCTION open_assessments(of_lesion uuid) RETURNS uuid []
LANGUAGE sql STABLE SET plan_cache_mode = force_generic_plan
BEGIN ATOMIC
    WITH same AS (SELECT unnest(same_lesions(of_lesion)) AS lesion_id)
    SELECT coalesce(array_agg(a.assessment_id ORDER BY a.assessment_id), '{}')
    FROM (
        SELECT own.assessment_id FROM same
        INNER JOIN lesion_images AS i ON i.lesion_id = same.lesion_id
        INNER JOIN assessments AS own ON own.image_id = i.image_id
        UNION
        SELECT unnest(k.left_open) FROM same
        INNER JOIN lesion_links AS k ON k.lesion_id = same.lesion_id OR k.earlier_lesion_id = same.lesion_id
    ) AS asked
    INNER JOIN assessments AS a ON a.assessment_id = asked.assessment_id
    WHERE a.demand_level IS NOT NULL AND a.demand_answered_at IS NULL;
END;
COMMENT ON FUNCTION open_assessments IS
'Whose demand is open for a lesion: of its own images, of those linked with it, and what a link that ended has left open.';

CREATE OR REPLACE FUNCTION open_demand(of_lesion uuid) RETURNS jsonb
LANGUAGE sql STABLE SET plan_cache_mode = force_generic_plan
BEGIN ATOMIC
    -- Where an image is filed is said only where that is not here: of all other lesions a replica of before reads it, too.
    SELECT jsonb_strip_nulls(jsonb_build_object(
        'level', max(a.demand_level) OVER (),
        'urgency', max(a.demand_urgency) OVER (),
        'lesion_id', nullif(i.lesion_id, of_lesion),
        'image_id', a.image_id,
        'assessment_id', a.assessment_id,
        'since', i.created_at
    ))
    FROM unnest(open_assessments(of_lesion)) AS open (assessment_id)
    INNER JOIN assessments AS a ON a.assessment_id = open.assessment_id
    INNER JOIN lesion_images AS i ON i.image_id = a.image_id
    ORDER BY a.demand_level DESC, a.demand_urgency DESC, i.created_at, i.image_id
    LIMIT 1;
END;
COMMENT ON FUNCTION open_demand IS
'The highest level and urgency that is demanded of a lesion unanswered (open_assessments), and the first image that demands the most; NULL for none.';

CREATE OR REPLACE FUNCTION is_held(i lesion_images) RETURNS boolean
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT EXISTS (
        SELECT FROM legal_holds AS h
        WHERE h.released_at IS NULL
            AND (h.patient_id = i.patient_id OR h.lesion_id = ANY(same_lesions(i.lesion_id)) OR h.image_id = i.image_id)
    );
END;

-- The one way to link: the application's role can neither add nor end a link itself.
CREATE FUNCTION link_lesion(said lesion_links) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    later lesions;
    earlier lesions;
BEGIN
    -- Both, and always in this order: of two that would link crosswise the second waits, and sees what the first did.
    PERFORM FROM lesions AS l WHERE l.lesion_id IN (said.lesion_id, said.earlier_lesion_id)
    ORDER BY l.lesion_id FOR NO KEY UPDATE;
    SELECT l.* INTO later FROM lesions AS l WHERE l.lesion_id = said.lesion_id;
    SELECT l.* INTO earlier FROM lesions AS l
    WHERE l.lesion_id = said.earlier_lesion_id AND l.patient_id = later.patient_id;
    IF earlier.lesion_id IS NULL THEN
        RETURN 'absent';
    ELSIF (earlier.created_at, earlier.lesion_id) >= (later.created_at, later.lesion_id) THEN
        RETURN 'not_earlier';
    ELSIF EXISTS (SELECT FROM lesion_links AS k WHERE k.lesion_id = later.lesion_id AND k.ended_at IS NULL) THEN
        RETURN 'linked';
    ELSIF EXISTS (SELECT FROM lesion_links AS k WHERE k.lesion_id = earlier.lesion_id AND k.ended_at IS NULL) THEN
        RETURN 'not_first';
    ELSIF EXISTS (SELECT FROM lesion_links AS k WHERE k.earlier_lesion_id = later.lesion_id AND k.ended_at IS NULL) THEN
        RETURN 'first_of_others';
    END IF;
    INSERT INTO lesion_links (link_id, lesion_id, earlier_lesion_id, patient_id, reason, linked_by, request_id)
    VALUES
        (said.link_id, later.lesion_id, earlier.lesion_id, later.patient_id, said.reason, said.linked_by, said.request_id);
    RETURN 'recorded';
END;
$$;
COMMENT ON FUNCTION link_lesion IS
'Link a lesion to an earlier one of its patient: recorded, absent (no such lesion of this patient), not_earlier, linked (already), not_first (the earlier one is linked itself) or first_of_others (others are linked to it).';

CREATE FUNCTION unlink_lesion(of_link uuid, by_actor text, for_reason text, in_request text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
    UPDATE lesion_links AS k
    SET ended_by = by_actor, ended_at = clock_timestamp(), end_reason = for_reason, end_request_id = in_request,
        left_open = open_assessments(k.lesion_id)
    WHERE k.link_id = of_link AND k.ended_at IS NULL
    RETURNING true;
$$;
COMMENT ON FUNCTION unlink_lesion IS
'End a link, once: true. What is open for the two then is open for each, until a clinician has answered it.';
REVOKE EXECUTE ON FUNCTION link_lesion, unlink_lesion FROM PUBLIC;
