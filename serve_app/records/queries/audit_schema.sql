-- name: audit_schema
-- All that decides who may change the audit log, and what is read of it: object and definition, as they are.
-- Asked as the role that owns the schema; $1 is the one that serves.
WITH roles AS (
    SELECT oid, rolsuper,
        CASE rolname
            WHEN current_user THEN 'the owner' WHEN $1 THEN 'the application' ELSE 'role ' || rolname
        END AS name
    FROM pg_roles
    UNION ALL
    SELECT 0, false, 'everybody'
), tables AS (
    SELECT c.* FROM pg_class AS c
    WHERE c.relname IN ('audit_events', 'audit_seals') AND c.relnamespace = to_regnamespace('public')
), functions AS (
    -- The tables' triggers, and what runs with more rights than the caller's: no other can do more than its caller.
    SELECT p.*, 'function ' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' AS name
    FROM pg_proc AS p
    WHERE p.oid IN (
            SELECT t.tgfoid FROM tables AS c JOIN pg_trigger AS t ON t.tgrelid = c.oid WHERE NOT t.tgisinternal
        ) OR (p.prosecdef AND p.pronamespace = to_regnamespace('public'))
), grants AS (
    SELECT 'table ' || c.relname AS name, c.relowner AS owner, c.relacl AS acl FROM tables AS c
    UNION ALL
    SELECT 'column ' || c.relname || '.' || a.attname, c.relowner, a.attacl
    FROM tables AS c
    JOIN pg_attribute AS a ON a.attrelid = c.oid
    UNION ALL
    -- Without a list everybody may execute a function.
    SELECT p.name, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)) FROM functions AS p WHERE p.prosecdef
    UNION ALL
    SELECT 'schema public', nspowner, nspacl FROM pg_namespace WHERE nspname = 'public'
)

-- Who reads, and who may look into the schema, changes nothing.
SELECT 'grant of ' || x.privilege_type || ' on ' || g.name || ' to ' || r.name AS object,
    'made' || CASE WHEN x.is_grantable THEN ', and may grant' ELSE '' END AS definition
FROM grants AS g
CROSS JOIN LATERAL aclexplode(g.acl) AS x
LEFT JOIN roles AS r ON r.oid = x.grantee
WHERE x.grantee <> g.owner AND r.name IS DISTINCT FROM 'the owner' AND r.rolsuper IS NOT TRUE
    AND x.privilege_type NOT IN ('SELECT', 'USAGE')
UNION ALL
SELECT 'schema public', 'owned by ' || r.name
FROM pg_namespace AS n
JOIN pg_database AS d ON d.datname = current_database()
LEFT JOIN roles AS r ON r.oid = CASE n.nspowner WHEN to_regrole('pg_database_owner') THEN d.datdba ELSE n.nspowner END
-- A superuser, or nobody but the owner.
WHERE n.nspname = 'public' AND r.name IS DISTINCT FROM 'the owner' AND r.rolsuper IS NOT TRUE
UNION ALL
SELECT 'table ' || c.relname, concat_ws(
    ', ', 'kind ' || c.relkind::text, 'persistence ' || c.relpersistence::text, 'owned by ' || r.name,
    CASE WHEN c.relrowsecurity OR c.relforcerowsecurity THEN 'row security' END,
    CASE WHEN c.relispartition THEN 'partition' END
)
FROM tables AS c
LEFT JOIN roles AS r ON r.oid = c.relowner
UNION ALL
SELECT 'column ' || c.relname || '.' || a.attname, concat_ws(
    ', ', format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN 'not null' END,
    'identity ' || nullif(a.attidentity::text, ''), 'generated ' || nullif(a.attgenerated::text, ''),
    'default ' || pg_get_expr(d.adbin, d.adrelid)
)
FROM tables AS c
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
UNION ALL
-- But for NOT NULL, which PostgreSQL has among the constraints since 18.
SELECT 'constraint ' || c.relname || '.' || k.conname,
    pg_get_constraintdef(k.oid) || CASE WHEN k.convalidated THEN '' ELSE ', not validated' END
FROM tables AS c
JOIN pg_constraint AS k ON k.conrelid = c.oid
WHERE k.contype <> 'n'
UNION ALL
SELECT 'index ' || i.relname, pg_get_indexdef(x.indexrelid) || CASE WHEN x.indisvalid THEN '' ELSE ', not valid' END
FROM tables AS c
JOIN pg_index AS x ON x.indrelid = c.oid
JOIN pg_class AS i ON i.oid = x.indexrelid
UNION ALL
SELECT 'trigger ' || c.relname || '.' || CASE WHEN t.tgisinternal THEN p.proname ELSE t.tgname END,
    'enabled ' || t.tgenabled::text || CASE WHEN t.tgisinternal THEN '' ELSE ', ' || pg_get_triggerdef(t.oid) END
FROM tables AS c
JOIN pg_trigger AS t ON t.tgrelid = c.oid
JOIN pg_proc AS p ON p.oid = t.tgfoid
UNION ALL
SELECT 'rule ' || c.relname || '.' || w.rulename, pg_get_ruledef(w.oid)
FROM tables AS c
JOIN pg_rewrite AS w ON w.ev_class = c.oid
UNION ALL
SELECT 'policy ' || c.relname || '.' || y.polname, 'enabled'
FROM tables AS c
JOIN pg_policy AS y ON y.polrelid = c.oid
UNION ALL
SELECT 'child of ' || c.relname, h.inhrelid::regclass::text
FROM tables AS c
JOIN pg_inherits AS h ON h.inhparent = c.oid
UNION ALL
SELECT p.name, concat_ws(
    ', ', l.lanname, 'owned by ' || r.name, CASE WHEN p.prosecdef THEN 'security definer' END,
    array_to_string(p.proconfig, '; '), coalesce(pg_get_function_sqlbody(p.oid), p.prosrc)
)
FROM functions AS p
JOIN pg_language AS l ON l.oid = p.prolang
LEFT JOIN roles AS r ON r.oid = p.proowner
UNION ALL
-- What would turn the triggers off, or send the service to other tables, from the next connection on.
SELECT 'setting of ' || coalesce(r.name, 'everybody'), s.setting
FROM pg_db_role_setting AS f
JOIN pg_database AS d ON f.setdatabase IN (0, d.oid) AND d.datname = current_database()
CROSS JOIN LATERAL unnest(f.setconfig) AS s (setting)
LEFT JOIN roles AS r ON r.oid = f.setrole AND f.setrole <> 0
WHERE s.setting ~ '^(search_path|session_replication_role|session_preload_libraries|local_preload_libraries)='
UNION ALL
SELECT 'event trigger ' || evtname, evtevent FROM pg_event_trigger WHERE evtevent = 'login'
UNION ALL
-- What is asked here itself, where somebody has replaced it: none of it is written in SQL by PostgreSQL.
SELECT 'built-in function ' || p.oid::regprocedure::text, 'replaced'
FROM pg_proc AS p
JOIN pg_language AS l ON l.oid = p.prolang
WHERE p.pronamespace = to_regnamespace('pg_catalog') AND l.lanname <> 'internal' AND p.proname IN (
    'int8eq', 'int8gt', 'int84gt', 'btint8cmp', 'timestamptz_lt', 'now', 'oideq', 'nameeq', 'texteq', 'aclexplode',
    'acldefault', 'format_type', 'pg_get_expr', 'pg_get_constraintdef', 'pg_get_indexdef', 'pg_get_triggerdef',
    'pg_get_ruledef', 'pg_get_function_identity_arguments', 'pg_get_function_sqlbody', 'array_to_string', 'concat_ws',
    'to_regnamespace', 'to_regrole'
)
ORDER BY object, definition;
