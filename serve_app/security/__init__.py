"""Who may do what, and how an image is kept: envelope, keys, tokens, access, audit events."""
