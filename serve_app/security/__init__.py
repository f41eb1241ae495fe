"""Tokens, access decisions, audit events; encryption of images, and where their keys are kept."""
