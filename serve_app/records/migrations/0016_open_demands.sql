-- What each image demands, kept beside its answer, and which images are confirmed to be of their lesion.

CREATE TYPE risk_level AS ENUM ('low', 'medium', 'high');
CREATE TYPE urgency AS ENUM ('routine', 'expedited', 'urgent');

-- In columns of their own, because they stay when the answer is erased with the image.
ALTER TABLE assessments ADD COLUMN demand_level risk_level;
ALTER TABLE assessments ADD COLUMN demand_urgency urgency;
ALTER TABLE assessments ADD COLUMN demand_answered_at timestamptz;
ALTER TABLE assessments ADD CONSTRAINT assessments_demand
CHECK ((demand_level IS NULL) = (demand_urgency IS NULL) AND (demand_answered_at IS NULL OR demand_level IS NOT NULL));
ALTER TABLE assessments ADD COLUMN confirmed_by text CHECK (confirmed_by <> '');
ALTER TABLE assessments ADD COLUMN confirmed_at timestamptz;
ALTER TABLE assessments ADD CONSTRAINT assessments_confirmed
CHECK ((confirmed_by IS NULL) = (confirmed_at IS NULL));
COMMENT ON COLUMN assessments.confirmed_by IS
'The clinician who said that the image shows the lesion it is filed under; without that, one that was questioned is not the lesion''s own.';
COMMENT ON COLUMN assessments.demand_level IS
'What the service''s rules demanded for this image: its risk, or of a refused image what its checklist demands.';
COMMENT ON COLUMN assessments.demand_answered_at IS
'When a clinician answered the demand: until then it is open, whatever images come later.';

UPDATE assessments
SET demand_level = (answer #>> '{risk,level}')::risk_level, demand_urgency = (answer #>> '{risk,urgency}')::urgency
WHERE answer #>> '{risk,level}' IS NOT NULL;
UPDATE assessments
SET demand_level = 'high', demand_urgency = 'urgent'
WHERE demand_level IS NULL AND answer -> 'reasons' @> '[{"code": "checklist_demands_referral"}]';

CREATE FUNCTION open_demand(of_lesion uuid) RETURNS jsonb
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT jsonb_build_object(
        'level', max(a.demand_level) OVER (),
        'urgency', max(a.demand_urgency) OVER (),
        'image_id', a.image_id,
        'assessment_id', a.assessment_id,
        'since', i.created_at
    )
    FROM lesion_images AS i
    INNER JOIN assessments AS a USING (image_id)
    WHERE i.lesion_id = of_lesion AND a.demand_level IS NOT NULL AND a.demand_answered_at IS NULL
    ORDER BY a.demand_level DESC, a.demand_urgency DESC, i.created_at, i.image_id
    LIMIT 1;
END;
COMMENT ON FUNCTION open_demand IS
'The highest level and urgency that a lesion''s images demand unanswered, and the first image that demands the most; NULL for none.';
