-- Whose images these are: the one key store that holds this database's data keys.

CREATE TABLE key_stores (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    store_id uuid NOT NULL,
    claimed_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE key_stores IS
'The id of the key store that this database belongs to, from the first start on: no service starts with another one.';
