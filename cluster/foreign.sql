-- What no database of this service has, a line each: whatever could act as the superuser that looks at it.
\set ON_ERROR_STOP on
SET search_path = pg_catalog;

SELECT format('the role %I may more than ours', rolname)
FROM pg_roles
WHERE oid >= 16384 AND (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls);

SELECT format('the role %s belongs to %s', m.member::regrole, m.roleid::regrole)
FROM pg_auth_members AS m
WHERE m.member >= 16384 AND m.roleid < 16384;

SELECT format('a setting of a role or a database (%s)', array_to_string(setconfig, ', ')) FROM pg_db_role_setting;

SELECT format('the event trigger %I', evtname) FROM pg_event_trigger;

SELECT format('the subscription %I', subname) FROM pg_subscription;

SELECT format('the tablespace %I', spcname) FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global');

SELECT format('the language %I', lanname) FROM pg_language WHERE oid >= 16384;

SELECT format('the foreign-data wrapper %I', fdwname) FROM pg_foreign_data_wrapper;

-- Whose indexes and rules would be evaluated with a superuser's rights.
SELECT format('the relation %s of a superuser', c.oid::regclass)
FROM pg_class AS c
INNER JOIN pg_roles AS r ON r.oid = c.relowner
WHERE c.oid >= 16384
    AND r.rolsuper
    AND c.relkind IN ('r', 'p', 'm', 'v', 'f')
    AND NOT EXISTS (
        SELECT FROM pg_depend AS d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
    );

-- Ours are derm_owner's; those of an extension are compiled, and of a library beside the server's own.
SELECT format('the function %s', p.oid::regprocedure)
FROM pg_proc AS p
INNER JOIN pg_language AS l ON l.oid = p.prolang
LEFT JOIN pg_depend AS d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
WHERE p.oid >= 16384
    AND CASE
        WHEN l.lanname = 'c' THEN d.objid IS NULL OR p.probin !~ '^\$libdir/\w+$'
        WHEN l.lanname = 'internal' THEN d.objid IS NULL OR p.prokind <> 'a'
        ELSE (SELECT r.rolsuper FROM pg_roles AS r WHERE r.oid = p.proowner)
    END;
