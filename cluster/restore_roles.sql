-- The superuser's password of a restored server: this home's, whatever it was where the backup was made.
\set ON_ERROR_STOP on
\getenv superuser_password PGPASSWORD
ALTER ROLE derm_superuser PASSWORD :'superuser_password';
