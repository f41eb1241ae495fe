-- name: settings
-- Read parameters of the server by their names.
SELECT name, setting FROM pg_settings WHERE name = ANY($1);

-- name: role
-- Say what the role that asks could do to the tables of the audit log: no row for one that is not there yet.
SELECT
    relation.relname AS table_name,
    current_user AS role,
    (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
    pg_has_role(current_user, relation.relowner, 'MEMBER')
    OR pg_has_role(current_user, namespace.nspowner, 'MEMBER') AS owns,
    has_any_column_privilege(relation.oid, 'UPDATE')
    OR has_table_privilege(relation.oid, 'DELETE, TRUNCATE, TRIGGER') AS changes
FROM pg_class AS relation
JOIN pg_namespace AS namespace ON namespace.oid = relation.relnamespace
WHERE relation.oid IN (to_regclass('audit_events'), to_regclass('audit_seals'))
ORDER BY relation.relname;

-- name: client_access
-- Read how pg_hba.conf lets clients in; for a superuser.
SELECT line_number, auth_method, error FROM pg_hba_file_rules;
