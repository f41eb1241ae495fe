"""Images erased for good, and what is left over let go."""
