"""The clinical record and the references, in PostgreSQL: stores that speak domain types."""
