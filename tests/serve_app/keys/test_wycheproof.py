"""Published test vectors (C2SP Wycheproof), through the libraries as we use them."""

from __future__ import annotations

from collections import Counter
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OctKey
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


def test_signatures_with_a_shared_secret(corpora_dir: Path) -> None:
    """All 40 HMAC vectors through joserfc, held to HS256 as the verifier holds it.

    It differs from the file in four, all of them the file's own: 367 and 370 ("invalid
    padding") are letter for letter the valid 357, and 372 and 373 ("valid") hold a "?", which
    RFC 7515 has no place for.
    """
    verdicts, tokens = {}, {}
    for group, test in vectors(corpora_dir / "wycheproof" / "json_web_signature_test.json"):
        jwk = group.get("private") or {}
        if jwk.get("kty") != "oct":
            continue
        try:
            jws.deserialize_compact(test["jws"], OctKey.import_key(jwk), algorithms=("HS256",))
            verdict = "valid"
        except JoseError:
            verdict = "invalid"
        verdicts[test["tcId"]] = (test["result"], verdict)
        tokens[test["tcId"]] = test["jws"]
    assert len(verdicts) == 40
    assert {number for number, (expected, got) in verdicts.items() if expected != got} == {367, 370, 372, 373}
    assert tokens[367] == tokens[370] == tokens[357]
    assert "?" in tokens[372]
    assert "?" in tokens[373]


def test_no_foreign_signature_is_a_token(corpora_dir: Path) -> None:
    verifier = TokenVerifier("s" * 32, "derm-cds", "derm-cds")
    tests = vectors(corpora_dir / "wycheproof" / "json_web_signature_test.json")
    assert len(tests) > 300
    for _, test in tests[::4]:
        with pytest.raises(Unauthenticated):
            verifier.verify(test["jws"])
