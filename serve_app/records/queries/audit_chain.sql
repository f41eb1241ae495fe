-- name: try_to_be_the_sealer
-- One sealer at a time, until its transaction ends ("dermseal" in ASCII); false when there is another.
SELECT pg_try_advisory_xact_lock(7234314190585520492);

-- name: be_the_sealer
-- As above, after whoever seals now.
SELECT pg_advisory_xact_lock(7234314190585520492);

-- name: head
-- The newest seal.
SELECT position, hash FROM public.audit_seals ORDER BY position DESC LIMIT 1;

-- name: unsealed
-- Up to $2 events that have no seal, of those with a higher number than the lowest of the last $1 that were sealed.
-- An event that commits late has a lower number than some that are sealed; nothing commits later than that many.
-- The last ones by their place in the chain: an event whose number is far ahead of all moves nothing.
WITH recent AS MATERIALIZED (
    SELECT min(event_id) AS lowest
    FROM (SELECT event_id FROM public.audit_seals ORDER BY position DESC LIMIT $1) AS newest
    HAVING count(*) = $1
)
SELECT
    0::bigint AS position, e.event_id, ''::bytea AS hash,
    e.event_id, e.recorded_at, e.action, e.actor, e.outcome, e.patient_id, e.lesion_id, e.image_id, e.assessment_id,
    e.request_id, e.detail
FROM public.audit_events AS e
WHERE e.event_id > coalesce((SELECT lowest FROM recent), 0)
    AND NOT EXISTS (
        SELECT FROM public.audit_seals AS s
        WHERE s.event_id = e.event_id AND s.event_id > coalesce((SELECT lowest FROM recent), 0)
    )
ORDER BY e.event_id
LIMIT $2;

-- name: chain
-- The next $2 seals after position $1, with their event as it is now; null where it is gone.
SELECT
    s.position, s.event_id, s.hash,
    e.event_id, e.recorded_at, e.action, e.actor, e.outcome, e.patient_id, e.lesion_id, e.image_id, e.assessment_id,
    e.request_id, e.detail
FROM public.audit_seals AS s
LEFT JOIN public.audit_events AS e ON e.event_id = s.event_id
WHERE s.position > $1
ORDER BY s.position
LIMIT $2;

-- name: hashes_at
-- The hashes of the seals at the positions $1.
SELECT position, hash FROM public.audit_seals WHERE position = ANY($1::bigint[]);

-- name: age
-- How long ago the first event was sealed.
SELECT now() - sealed_at FROM public.audit_seals ORDER BY position LIMIT 1;

-- name: unsealed_since
-- Events without a seal that are older than $1, now or ($2) at the last seal: added behind the sealer's back, or it
-- does not run.
SELECT event_id FROM public.audit_events AS e
WHERE e.recorded_at < CASE WHEN $2 THEN (SELECT max(sealed_at) FROM public.audit_seals) ELSE now() END - $1::interval
    AND NOT EXISTS (SELECT FROM public.audit_seals AS s WHERE s.event_id = e.event_id)
ORDER BY event_id;

-- name: overdue
-- Events of those that `unsealed` looks at, which have had no seal for $2.
WITH recent AS MATERIALIZED (
    SELECT min(event_id) AS lowest
    FROM (SELECT event_id FROM public.audit_seals ORDER BY position DESC LIMIT $1) AS newest
    HAVING count(*) = $1
)
SELECT e.event_id FROM public.audit_events AS e
WHERE e.event_id > coalesce((SELECT lowest FROM recent), 0)
    AND e.recorded_at < now() - $2::interval
    AND NOT EXISTS (
        SELECT FROM public.audit_seals AS s
        WHERE s.event_id = e.event_id AND s.event_id > coalesce((SELECT lowest FROM recent), 0)
    )
ORDER BY e.event_id;

-- name: events_between
-- The next $4 events after event $3 that were recorded from $1 on and before $2.
SELECT * FROM public.audit_events
WHERE recorded_at >= $1 AND recorded_at < $2 AND event_id > $3
ORDER BY event_id
LIMIT $4;
