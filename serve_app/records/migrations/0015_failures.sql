-- What fails on and on ends: tries are counted against one assessment or message only while others get through.

ALTER TABLE assessments ADD COLUMN setbacks integer NOT NULL DEFAULT 0;
ALTER TABLE assessments ADD COLUMN set_back_at timestamptz;
COMMENT ON COLUMN assessments.setbacks IS
'Tries that failed although another image was answered since the try before: what failed was not the whole service.';
COMMENT ON COLUMN assessments.set_back_at IS
'When the last try failed.';
CREATE INDEX assessments_answered_at ON assessments (completed_at) WHERE answer IS NOT NULL;
CREATE INDEX assessments_failed_at ON assessments (completed_at) WHERE outcome = 'failed';

ALTER TABLE outbox ADD COLUMN setbacks integer NOT NULL DEFAULT 0;
ALTER TABLE outbox ADD COLUMN set_back_at timestamptz;
COMMENT ON COLUMN outbox.setbacks IS
'Attempts that failed although another message was delivered since the attempt before.';
COMMENT ON COLUMN outbox.set_back_at IS
'When the last attempt failed.';
CREATE INDEX outbox_delivered_at ON outbox (delivered_at) WHERE delivered_at IS NOT NULL;
