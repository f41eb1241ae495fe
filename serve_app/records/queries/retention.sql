-- name: close
-- Close a patient's record from a moment on; closed again, the first moment stays.
INSERT INTO closed_records (patient_id, closed_at, closed_by) VALUES ($1, $2, $3)
ON CONFLICT (patient_id) DO NOTHING
RETURNING *;

-- name: reopen
-- Open a closed record again.
DELETE FROM closed_records WHERE patient_id = $1 RETURNING *, true AS gone;

-- name: expired
-- Images past their retention that no hold keeps, longest past first, up to $2.
SELECT i.lesion_id, i.image_id
FROM closed_records AS c
INNER JOIN lesions AS l USING (patient_id)
INNER JOIN lesion_images AS i USING (lesion_id)
WHERE i.erased_at IS NULL
    AND greatest(c.closed_at, i.created_at) < now() - $1::interval
    AND NOT is_held(i)
ORDER BY greatest(c.closed_at, i.created_at), i.image_id
LIMIT $2;

-- name: count
-- Closed records, images past their retention, and how many of these a hold keeps.
SELECT
    (SELECT count(*) FROM closed_records) AS closed,
    count(i.image_id) AS expired,
    count(i.image_id) FILTER (WHERE is_held(i)) AS held
FROM closed_records AS c
INNER JOIN lesions AS l USING (patient_id)
INNER JOIN lesion_images AS i USING (lesion_id)
WHERE i.erased_at IS NULL AND greatest(c.closed_at, i.created_at) < now() - $1::interval;
