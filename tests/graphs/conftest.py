"""Imports Ray before the tests do: its own imports warn of what Ray itself will have to change."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401
