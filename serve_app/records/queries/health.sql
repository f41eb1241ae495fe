-- name: references_licensed
-- every reference is public and licensed, and found under that licence alone
SELECT count(*) FROM reference_images AS r
WHERE r.copyright_license NOT IN ('CC-0', 'CC-BY', 'CC-BY-NC')
    OR btrim(r.attribution) = ''
    OR EXISTS (
        SELECT FROM reference_embeddings AS e
        WHERE e.isic_id = r.isic_id AND e.copyright_license <> r.copyright_license
    );

-- name: references_of_the_archive
-- no patient image is in the reference tables
-- Counted: another kind of id than the archive's, or a lesion of ours.
SELECT count(*) FROM reference_images AS r
WHERE r.isic_id !~ '^ISIC_[0-9]+$'
    OR EXISTS (SELECT FROM lesions AS l WHERE l.lesion_id::text = r.lesion_id);

-- name: live_vectors_of_unit_norm
-- every live reference has a vector of norm 1
-- To the precision of a halfvec.
SELECT count(*) FROM reference_embeddings AS e
INNER JOIN serving AS s USING (embedding_space)
WHERE abs(l2_norm(e.embedding) - 1) > 0.01;

-- name: live_space_holds_references
-- the live space holds references
SELECT count(*) FROM serving AS s
WHERE NOT EXISTS (SELECT FROM reference_embeddings AS e WHERE e.embedding_space = s.embedding_space);

-- name: live_space_of_the_live_model
-- the live model filled the live space
SELECT count(*) FROM serving AS s
INNER JOIN space_embedders AS f USING (embedding_space)
WHERE f.model_id <> s.model_id;

-- name: erased_images_leave_nothing
-- no erased image has a vector, an answer, a note, a comment or more than its counts in reports
SELECT count(*) FROM lesion_images AS i
WHERE i.erased_at IS NOT NULL AND (
    EXISTS (SELECT FROM lesion_embeddings AS e WHERE e.image_id = i.image_id)
    OR EXISTS (SELECT FROM assessments AS a WHERE a.image_id = i.image_id AND a.answer IS NOT NULL)
    OR EXISTS (
        SELECT FROM assessments AS a
        INNER JOIN reviews AS r USING (assessment_id)
        WHERE a.image_id = i.image_id AND r.note IS NOT NULL
    )
    OR EXISTS (
        SELECT FROM assessments AS a
        INNER JOIN hook_cards AS c USING (assessment_id)
        INNER JOIN hook_feedback AS f USING (card_id)
        WHERE a.image_id = i.image_id AND f.comment IS NOT NULL
    )
    OR EXISTS (
        SELECT FROM assessments AS a
        INNER JOIN assessment_facts AS f USING (assessment_id)
        WHERE a.image_id = i.image_id AND num_nonnulls(f.site, f.age_band, f.sex, f.skin_type, f.device, f.level) > 0
    )
);

-- name: demands_answered_by_decisions
-- every demand that is answered is among what a decision answers
SELECT count(*) FROM (
    SELECT a.assessment_id FROM assessments AS a WHERE a.demand_answered_at IS NOT NULL
    EXCEPT
    SELECT unnest(r.answers) FROM reviews AS r
) AS unsaid;

-- name: links_to_a_first
-- every lesion that is linked is linked to an earlier one that is linked to none
SELECT count(*) FROM lesion_links AS k
INNER JOIN lesions AS l USING (lesion_id)
INNER JOIN lesion_heads AS e ON e.lesion_id = k.earlier_lesion_id
WHERE k.ended_at IS NULL AND (e.head <> e.lesion_id OR (e.created_at, e.lesion_id) >= (l.created_at, l.lesion_id));

-- name: erasures_proven
-- every accepted erasure has its receipt within ten minutes
SELECT count(*) FROM erasures AS e
WHERE e.accepted_at < now() - interval '10 minutes'
    AND NOT EXISTS (SELECT FROM erasure_receipts AS r WHERE r.receipt_id = e.receipt_id);
