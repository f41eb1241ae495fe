"""Benchmarks: one command each, JSON out, always against a baseline measured in the same run."""
