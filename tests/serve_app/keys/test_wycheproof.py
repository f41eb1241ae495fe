"""Published test vectors (C2SP Wycheproof), through the libraries as we use them."""

from __future__ import annotations

from collections import Counter
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap_with_padding,
)
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


def decrypted(test: dict[str, Any]) -> str:
    key, nonce, aad, sealed = (bytes.fromhex(test[name]) for name in ("key", "iv", "aad", "ct"))
    try:
        plaintext = AESGCM(key).decrypt(nonce, sealed + bytes.fromhex(test["tag"]), aad)
    except (InvalidTag, ValueError) as error:
        return type(error).__name__
    return "right" if plaintext.hex() == test["msg"] else "wrong"


def test_aes_gcm(corpora_dir: Path) -> None:
    """All 316. Our nonces are of 96 bits: there, every vector gets exactly its verdict.

    Elsewhere nothing wrong is accepted, and the library's own policy (8 to 128 bytes) refuses
    27 valid ones.
    """
    verdicts = Counter(
        ("96-bit" if group["ivSize"] == 96 else "other", test["result"], decrypted(test))
        for group, test in vectors(corpora_dir / "wycheproof" / "aes_gcm_test.json")
    )
    assert verdicts == {
        ("96-bit", "valid", "right"): 116,
        ("96-bit", "invalid", "InvalidTag"): 81,
        ("other", "valid", "right"): 86,
        ("other", "valid", "ValueError"): 27,
        ("other", "invalid", "ValueError"): 6,
    }


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


def unwrapped(test: dict[str, Any]) -> str:
    try:
        key = aes_key_unwrap_with_padding(bytes.fromhex(test["key"]), bytes.fromhex(test["ct"]))
    except (InvalidUnwrap, ValueError):
        return "refused"
    return "right" if key.hex() == test["msg"] else "wrong"


def test_aes_key_wrapping_with_padding(corpora_dir: Path) -> None:
    """All 254 of RFC 5649: nothing wrong is accepted, and every valid one is.

    Our keyring wraps with AES-GCM; keys that come from elsewhere (PKCS #11, Vault's import) use this.
    """
    tests = vectors(corpora_dir / "wycheproof" / "aes_kwp_test.json")
    verdicts = Counter((test["result"], unwrapped(test)) for _, test in tests)
    assert verdicts == {("valid", "right"): 77, ("invalid", "refused"): 177}
    for _, test in tests:
        if test["result"] == "valid":
            wrapped = aes_key_wrap_with_padding(bytes.fromhex(test["key"]), bytes.fromhex(test["msg"]))
            assert wrapped.hex() == test["ct"], test["tcId"]


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
    for _, test in tests:
        with pytest.raises(Unauthenticated):
            verifier.verify(test["jws"])
    assert len(tests) > 300
