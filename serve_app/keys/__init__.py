"""How an image is kept: the envelope, the key store, and what wraps its keys."""
