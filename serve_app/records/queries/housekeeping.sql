-- name: expire_idempotency_keys
-- Let go of keys that are older than this, unless what they led to is still pending; up to $2.
DELETE FROM idempotency_keys
WHERE (actor, key) IN (
    SELECT k.actor, k.key
    FROM idempotency_keys AS k
    LEFT JOIN assessments AS a USING (assessment_id)
    WHERE k.created_at < now() - $1::interval AND a.outcome IS DISTINCT FROM 'pending'
    ORDER BY k.created_at
    LIMIT $2
)
RETURNING 1;

-- name: orphaned
-- Of these data keys, those without an image.
SELECT k.data_key_id
FROM unnest($1::uuid[]) AS k (data_key_id)
WHERE NOT EXISTS (SELECT FROM lesion_images AS i WHERE i.data_key_id = k.data_key_id);

-- name: let_no_image_in
-- Until this transaction ends, no image can come in: those on their way are waited for ("dermkeys" in ASCII).
SELECT pg_advisory_xact_lock(7234314190719383923);

-- name: condemn
-- From now on, no image of these data keys can come in.
INSERT INTO condemned_data_keys (data_key_id)
SELECT unnest($1::uuid[])
ON CONFLICT DO NOTHING;
