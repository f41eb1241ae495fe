"""Everything about machines: the embedded PostgreSQL, the node and the command line."""
