-- Only under a licence of the archive can an image become a reference.

-- What is there already is not looked at: a node with a row of another licence must still start, and the invariant
-- references_licensed names it.
ALTER TABLE reference_images
ADD CONSTRAINT reference_images_licensed CHECK (copyright_license IN ('CC-0', 'CC-BY', 'CC-BY-NC')) NOT VALID;
