"""The HTTP interface at /api/lesions."""
