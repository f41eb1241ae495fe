"""Reference cases: which confirmed archive images a clinician may be shown, and their embeddings."""
