"""Published test vectors (C2SP Wycheproof), through a data key and through what checks our tokens."""

from __future__ import annotations

from collections import Counter
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from serve_app.access.tokens import TokenVerifier
from serve_app.domain.errors import IntegrityError, Unauthenticated
from serve_app.keys.envelope import DataKey


def vectors(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    groups = json.loads(path.read_text())["testGroups"]
    return [(group, test) for group in groups for test in group["tests"]]


def test_aes_gcm_through_a_data_key(corpora_dir: Path) -> None:
    """Those of our own parameters, 256-bit key and 96-bit nonce, both ways."""
    ran = Counter[str]()
    for group, test in vectors(corpora_dir / "wycheproof" / "aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"]) != (256, 96):
            continue
        key, nonce, aad, message = (bytes.fromhex(test[name]) for name in ("key", "iv", "aad", "msg"))
        sealed = bytes.fromhex(test["ct"] + test["tag"])
        data_key = DataKey(uuid4(), key, spent=False)
        ran[test["result"]] += 1
        if test["result"] == "valid":
            assert data_key.decrypt(nonce, sealed, aad) == message, test["tcId"]
            assert data_key.encrypt(nonce, message, aad) == sealed, test["tcId"]
        else:
            with pytest.raises(IntegrityError):
                data_key.decrypt(nonce, sealed, aad)
    assert ran == {"valid": 39, "invalid": 27}


def test_no_foreign_signature_is_a_token(corpora_dir: Path) -> None:
    verifier = TokenVerifier("s" * 32, "derm-cds", "derm-cds")
    tests = vectors(corpora_dir / "wycheproof" / "json_web_signature_test.json")
    assert len(tests) > 300
    for _, test in tests[::4]:
        with pytest.raises(Unauthenticated):
            verifier.verify(test["jws"])
