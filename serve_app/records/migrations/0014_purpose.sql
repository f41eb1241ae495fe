-- An erasure's own event says what it was for, as all others do (serve_app/security/purpose.py).

CREATE OR REPLACE FUNCTION erase_image(
    of_lesion uuid, of_image uuid, receipt uuid, for_reason text, with_note text, by_actor text, in_request text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
AS $$
DECLARE
    image lesion_images;
BEGIN
    -- Against a hold that is being set ("dermhold" in ASCII): the one that comes second sees the other.
    PERFORM pg_advisory_xact_lock_shared(7234314190669704292);
    SELECT * INTO image FROM lesion_images AS i
    WHERE i.lesion_id = of_lesion AND i.image_id = of_image
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'absent';
    ELSIF image.erased_at IS NOT NULL THEN
        RETURN 'erased';
    ELSIF is_held(image) THEN
        RETURN 'held';
    END IF;

    INSERT INTO erasures
        (receipt_id, image_id, data_key_id, ciphertext_sha256, reason, note, actor, request_id)
    VALUES
        (receipt, of_image, image.data_key_id, sha256(image.sealed), for_reason, with_note, by_actor, in_request);
    UPDATE lesion_images SET sealed = NULL, erased_at = clock_timestamp() WHERE image_id = of_image;
    -- Before the vectors: whoever completes the assessment now waits here, and then adds none.
    UPDATE assessments
    SET outcome = CASE WHEN outcome = 'pending' THEN 'cancelled' ELSE 'erased' END,
        answer = NULL, failure = NULL, context = '{}', lease_until = NULL,
        completed_at = coalesce(completed_at, now())
    WHERE image_id = of_image;
    DELETE FROM lesion_embeddings WHERE image_id = of_image;
    -- What the PMS was not told yet it is not told any more.
    DELETE FROM outbox AS o
    USING assessments AS a
    WHERE o.assessment_id = a.assessment_id AND a.image_id = of_image AND o.delivered_at IS NULL;
    INSERT INTO audit_events (action, actor, outcome, patient_id, lesion_id, image_id, request_id, detail)
    VALUES ('erase', by_actor, 'success', image.patient_id, of_lesion, of_image, in_request,
            jsonb_build_object(
                'receipt_id', receipt,
                'reason', for_reason,
                'purpose', CASE WHEN for_reason IN ('patient_request', 'consent_withdrawn') THEN 'PATRQT' ELSE 'HOPERAT' END
            ));
    RETURN 'accepted';
END;
$$;
