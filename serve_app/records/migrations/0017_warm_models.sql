-- A model is ready in every replica before it becomes the one that answers.

CREATE TABLE serving_candidate (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    announcement uuid NOT NULL,
    model_id text NOT NULL,
    model_digest text NOT NULL,
    embedding_space text NOT NULL,
    announced_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE serving_candidate IS
'The model that every replica is to make ready, while somebody waits to let it answer.';

CREATE TABLE serving_replicas (
    replica_id uuid PRIMARY KEY,
    seen_at timestamptz NOT NULL,
    ready uuid,
    fault text
);
COMMENT ON TABLE serving_replicas IS
'Ingress replicas that are up: each writes its row every two seconds, and takes it away when it stops.';
COMMENT ON COLUMN serving_replicas.ready IS
'The announcement whose model this replica found ready in every replica of every stage.';
COMMENT ON COLUMN serving_replicas.fault IS
'Why it did not.';
