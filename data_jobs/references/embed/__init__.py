"""Embedding the reference cache: a folder of images in, one space of the database filled, resumably.

The folder is what `data_jobs.references.fetch` writes. The database is the node's, for the role that owns the
schema: DERM_OWNER_DATABASE_URL, else what the node wrote below DERM_HOME. Under `ray job submit`, or with
RAY_ADDRESS, the job joins a cluster that serves; otherwise it starts Ray. Started again, it goes on where it was.
"""
