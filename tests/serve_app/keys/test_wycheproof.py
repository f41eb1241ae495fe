"""Published test vectors (C2SP Wycheproof), through what checks our tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_app.access.tokens import TokenVerifier
from serve_app.domain.errors import Unauthenticated


def test_no_foreign_signature_is_a_token(corpora_dir: Path) -> None:
    verifier = TokenVerifier("s" * 32, "derm-cds", "derm-cds")
    groups = json.loads((corpora_dir / "wycheproof" / "json_web_signature_test.json").read_text())[
        "testGroups"
    ]
    tests = [test for group in groups for test in group["tests"]]
    assert len(tests) > 300
    for test in tests[::4]:
        with pytest.raises(Unauthenticated):
            verifier.verify(test["jws"])
