-- Roles and database of the embedded server; run by its superuser, once, and harmless twice.
-- derm_owner migrates and owns the schema; derm_app serves, with what grants.sql gives it.
\set ON_ERROR_STOP on
\getenv owner_password DERM_OWNER_PASSWORD
\getenv app_password DERM_APP_PASSWORD

SELECT 'CREATE ROLE derm_owner' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'derm_owner') \gexec
SELECT 'CREATE ROLE derm_app' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'derm_app') \gexec
ALTER ROLE derm_owner LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD :'owner_password';
ALTER ROLE derm_app LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD :'app_password';

SELECT 'CREATE DATABASE derm OWNER derm_owner'
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'derm') \gexec
REVOKE ALL ON DATABASE derm, postgres, template1 FROM PUBLIC;
GRANT CONNECT ON DATABASE derm TO derm_app;

\connect derm
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO derm_app;
ALTER SCHEMA public OWNER TO derm_owner;
-- pgvector is not a trusted extension: only a superuser may make it.
CREATE EXTENSION IF NOT EXISTS vector;
