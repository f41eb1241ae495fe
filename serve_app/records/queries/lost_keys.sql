-- name: has_images
-- Whether this database has lesions' images at all: before the first start it has no tables.
SELECT to_regclass('lesion_images') IS NOT NULL;

-- name: has_sealed_images
-- Whether there is an image that a data key is needed for.
SELECT EXISTS (SELECT FROM lesion_images WHERE sealed IS NOT NULL);
