-- name: patient
-- Find what is known of a patient; the age in whole years, today.
SELECT
    extract(year FROM age(current_date, birth_date))::integer AS age,
    sex, personal_melanoma, personal_skin_cancer, family_melanoma, immunosuppression
FROM patient_records
WHERE patient_id = $1;

-- name: encounter
-- Find whose an encounter is.
SELECT patient_id FROM patient_encounters WHERE encounter_id = $1;

-- name: put_patient
-- Write what is known of a patient over what was known.
INSERT INTO patient_records
    (patient_id, birth_date, sex, personal_melanoma, personal_skin_cancer, family_melanoma, immunosuppression)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (patient_id) DO UPDATE
SET (birth_date, sex, personal_melanoma, personal_skin_cancer, family_melanoma, immunosuppression, updated_at)
    = ($2, $3, $4, $5, $6, $7, now());

-- name: losing
-- Whose of these encounters were, other than the patient's.
SELECT DISTINCT patient_id FROM patient_encounters WHERE encounter_id = ANY($2::text[]) AND patient_id <> $1;

-- name: loaded
-- Patients as they are on record, all or ($1) these, each with the encounters that are its.
SELECT p.*, array(
    SELECT e.encounter_id FROM patient_encounters AS e
    WHERE e.patient_id = p.patient_id
    ORDER BY e.encounter_id COLLATE "C"
) AS encounters
FROM patient_records AS p
WHERE $1::text[] IS NULL OR p.patient_id = ANY($1);

-- name: put_encounters
-- Add a patient's encounters; one that was another patient's is this one's from now on.
INSERT INTO patient_encounters (encounter_id, patient_id)
SELECT encounter_id, $1 FROM unnest($2::text[]) AS given (encounter_id)
ON CONFLICT (encounter_id) DO UPDATE SET patient_id = excluded.patient_id;
