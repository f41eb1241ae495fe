-- name: references_licensed
-- Count the references without a licence that lets them be shown, or without anyone to name for them, and those
-- that a search limited to licences would find under another than theirs.
SELECT count(*) FROM reference_images AS r
WHERE r.copyright_license NOT IN ('CC-0', 'CC-BY', 'CC-BY-NC')
    OR btrim(r.attribution) = ''
    OR EXISTS (
        SELECT FROM reference_embeddings AS e
        WHERE e.isic_id = r.isic_id AND e.copyright_license <> r.copyright_license
    );

-- name: references_of_the_archive
-- Count the references that are not the archive's: another kind of id, or a lesion of ours.
SELECT count(*) FROM reference_images AS r
WHERE r.isic_id !~ '^ISIC_[0-9]+$'
    OR EXISTS (SELECT FROM lesions AS l WHERE l.lesion_id::text = r.lesion_id);

-- name: live_vectors_of_unit_norm
-- Count the vectors of the live space that are not of unit norm, to the precision of a halfvec.
SELECT count(*) FROM reference_embeddings AS e
INNER JOIN serving AS s USING (embedding_space)
WHERE abs(l2_norm(e.embedding) - 1) > 0.01;

-- name: live_space_holds_references
-- One when the live space is empty.
SELECT count(*) FROM serving AS s
WHERE NOT EXISTS (SELECT FROM reference_embeddings AS e WHERE e.embedding_space = s.embedding_space);

-- name: live_space_of_the_live_model
-- One when another model than the live one filled the live space.
SELECT count(*) FROM serving AS s
INNER JOIN space_embedders AS f USING (embedding_space)
WHERE f.model_id <> s.model_id;

-- name: erased_images_leave_nothing
-- Count the erased images that a vector or an answer is left of.
SELECT count(*) FROM lesion_images AS i
WHERE i.erased_at IS NOT NULL AND (
    EXISTS (SELECT FROM lesion_embeddings AS e WHERE e.image_id = i.image_id)
    OR EXISTS (SELECT FROM assessments AS a WHERE a.image_id = i.image_id AND a.answer IS NOT NULL)
);

-- name: erasures_proven
-- Count the erasures whose data key may still be there long after they were accepted.
SELECT count(*) FROM erasures AS e
WHERE e.accepted_at < now() - interval '10 minutes'
    AND NOT EXISTS (SELECT FROM erasure_receipts AS r WHERE r.receipt_id = e.receipt_id);
