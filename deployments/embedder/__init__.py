"""The bottleneck mapped into embedding spaces, for patients and references alike."""
