-- Events are hashed outside the database: whoever can replace a function here could make any log verify.

DROP FUNCTION audit_digest(audit_events);
COMMENT ON COLUMN audit_seals.hash IS
'SHA-256 of the hash before (32 zero bytes at first), the position (8 bytes, big-endian) and the SHA-256 of the event, whose form is in serve_app/audit/chain.py.';
