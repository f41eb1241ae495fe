"""Reference images from the ISIC Archive, its bucket or a folder: `python -m data_jobs.references.fetch`."""
