"""A PMS, and a database of its own with assessments in it."""

from __future__ import annotations

from tests.serve_app.pms.conftest import client, pms, queue, token_file
from tests.serve_app.records.conftest import admission, assessment, event, unit_vectors

__all__ = ["admission", "assessment", "client", "event", "pms", "queue", "token_file", "unit_vectors"]
