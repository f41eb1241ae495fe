"""Embedding the reference cache: a folder of images in, one space of the database filled, resumably.

The folder is what `data_jobs.references.fetch` writes. DERM_OWNER_DATABASE_URL names the database, for the
role that owns the schema. On a node of its own the job starts Ray; under `ray job submit`, or with
RAY_ADDRESS, it joins the cluster. Started again, it goes on where it was.
"""
