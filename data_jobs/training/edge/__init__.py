"""Copies of the served model for edge devices, each with the proof that it answers as the server does."""
