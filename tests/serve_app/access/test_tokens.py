"""Tokens that must not get in, and the few that may."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from contextlib import suppress
import hashlib
import hmac
import json
import re
import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey
import pytest

from serve_app.access.rules import Principal
from serve_app.access.tokens import TokenVerifier, check_subject, mint_token
from serve_app.audit.events import NOBODY, OUTBOX, RETENTION, os_account, reads_like_own_actor
from serve_app.domain.errors import LifetimeRefused, SubjectRefused, Unauthenticated
from serve_app.settings import REPOSITORY

SECRET = "a development secret of 32 bytes"
ISSUER, AUDIENCE = "https://pms.example", "derm-cds"
VERIFIER = TokenVerifier(SECRET, ISSUER, AUDIENCE)
HS256 = {"alg": "HS256", "typ": "JWT"}
DIGESTS = {"HS384": hashlib.sha384, "HS512": hashlib.sha512}


def claims(**changed: Any) -> dict[str, Any]:
    """Good claims, changed; None takes a claim out."""
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "dr-1", "roles": ["clinician"], "exp": time.time() + 600}
    return {name: value for name, value in {**good, **changed}.items() if value is not None}


def b64(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()


def forge(header: Any, payload: Any, *, secret: str = SECRET) -> str:
    """Make a token by hand: any header and payload, honestly signed, as HS384 and HS512 where it says so."""
    parts = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload))
    signed = ".".join(b64(part) for part in parts)
    algorithm = header.get("alg") if isinstance(header, dict) else None
    digest = DIGESTS.get(algorithm if isinstance(algorithm, str) else "", hashlib.sha256)
    return f"{signed}.{b64(hmac.digest(secret.encode(), signed.encode(), digest))}"


def refuse(token: str) -> None:
    with pytest.raises(Unauthenticated) as raised:
        VERIFIER.verify(token)
    assert str(raised.value) == "A valid bearer token is required."


def test_a_minted_token_says_who_it_is() -> None:
    roles = ["pms_service", "clinician"]
    token = mint_token(secret=SECRET, issuer=ISSUER, audience=AUDIENCE, subject="dr-1", roles=roles)
    assert VERIFIER.verify(token) == Principal("dr-1", frozenset({"clinician", "pms_service"}))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"aud": ["other", AUDIENCE]},
        {"nbf": 1_700_000_000, "iat": time.time() - 80_000},
        {"jti": "7", "scope": "lesions", "nested": {"a": [1, None]}},
        {"roles": None},
        {"roles": []},
    ],
)
def test_good_claims_get_in(changed: dict[str, Any]) -> None:
    principal = VERIFIER.verify(forge(HS256, claims(**changed)))
    assert (principal.subject, principal.token_id) == (changed.get("sub", "dr-1"), changed.get("jti"))
    assert principal.roles == frozenset(changed.get("roles", ["clinician"]) or [])


NAN, INFINITY, YEAR_2096 = float("nan"), float("inf"), 4_000_000_000


@pytest.mark.parametrize(
    "changed",
    [
        *({"iss": value} for value in (None, "", "derm-cds", ISSUER + "/", [ISSUER], 7)),
        *({"aud": value} for value in (None, "", "other", [], ["other"], [AUDIENCE, 7], {AUDIENCE: 1})),
        *({"exp": value} for value in (None, 0, -1, "9999999999", True, NAN, INFINITY, [9999999999])),
        *({"nbf": value} for value in (YEAR_2096, "0", True, NAN, INFINITY)),
        *({"iat": value} for value in (YEAR_2096, "0", True, NAN)),
        *({"jti": value} for value in ("", 7, "x" * 256, "a\nb", " 7", "7\u200b", "7\u034f")),
        *({"sub": value} for value in (7, True, ["dr-1"], {"a": 1})),
        *({"roles": value} for value in ("clinician", {"clinician": 1}, 7, [7], [None], [["clinician"]])),
    ],
    ids=repr,
)
def test_bad_claims_stay_out(changed: dict[str, Any]) -> None:
    refuse(forge(HS256, claims(**changed)))


@pytest.mark.parametrize(
    "subject",
    [
        *(
            "Ärztin 1",
            "x" * 255,
            "auth0|507f1f77",
            "https://pms.example/u/7",
            "o's:x",
            "osman:1",
            "x-os:root",
            "derm-cds-pms",
        ),
        *("retention-nurse", "екатерина", "Анна-Ева", "Иван", "院长", "1s:2", "05:1f:2b"),
    ],
)
def test_who_may_be_a_caller(subject: str) -> None:
    assert VERIFIER.verify(forge(HS256, claims(sub=subject))).subject == subject


#: What our own processes and commands write as the actor of an event, in forms that read like it; and what is no name.
NOT_A_CALLERS = [
    *(
        "os:root",
        "OS:root",
        "Os:1000",
        "os :root",
        "o s:root",
        "0s:root",
        "os:",
        "o\u0301s:x",
        "\U0001d428s:root",
    ),
    *(
        "\uff4f\uff53:root",
        "os\uff1aroot",
        "os\ufe55root",
        "os\u2236root",
        "os\u02d0root",
        "os\ua789root",
        "\u24de\u24e2:root",
    ),
    *(
        "\u043es:root",
        "o\u0455:root",
        "\u043e\u0455:root",
        "\u03bf\u0455:1000",
        "o\u0332s:root",
        "os\u0336:root",
    ),
    *(
        "derm-cds",
        "derm-cds:outbox",
        "Derm-CDS:Outbox",
        "derm-cds:anything",
        "derm\u2010cds:outbox",
        "d\u0435rm-cds:outbox",
    ),
    *(
        "retention",
        "RETENTION",
        "retent1on",
        "r\u0435tention",
        "re\u0301tention",
        "unauthenticated",
        "unauthent\u0456cated",
    ),
    *(
        "os\u200b:root",
        "\u2060os:root",
        "os\u00ad:root",
        "os\x00:root",
        "o\u034fs:root",
        "retention\ufe0f",
        "\u115fretention",
    ),
    *(
        "",
        " ",
        "\t",
        " dr-demo",
        "dr-demo ",
        "\u00a0dr-demo",
        "dr-demo\u3000",
        "dr-demo\u200b",
        "\ufeffdr-demo",
        "dr\u2800",
    ),
    *(
        "dr\x00",
        "dr\n2026 success",
        "dr\r",
        "dr\x1b[31m",
        "\u202edr",
        "\ud800",
        "x" * 256,
        "A\u0308rztin",
        "\ufb01",
        "\uff44r",
    ),
]


@pytest.mark.parametrize("subject", [None, *NOT_A_CALLERS], ids=repr)
def test_a_subject_that_reads_like_another_or_like_ours_is_refused(subject: str | None) -> None:
    with pytest.raises(SubjectRefused):
        VERIFIER.verify(forge(HS256, claims(sub=subject)))
    with pytest.raises(SubjectRefused):
        mint_token(secret=SECRET, issuer=ISSUER, audience=AUDIENCE, subject=subject, roles=[])


def test_no_caller_has_the_name_of_an_actor_of_ours() -> None:
    """Whatever the code writes as an actor: a name that is new must be refused as well."""
    written = re.compile(r"""\b(?:actor|by)\s*=\s*["']([^"']+)["']""")
    folders = (REPOSITORY / name for name in ("serve_app", "cluster", "data_jobs"))
    texts = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    for name in {OUTBOX, RETENTION, NOBODY, os_account(), *(n for t in texts for n in written.findall(t))}:
        assert reads_like_own_actor(name), name
        assert reads_like_own_actor(name.upper()), name


def test_a_token_is_valid_for_a_day_at_most_or_what_is_set() -> None:
    now = int(time.time())
    hour = TokenVerifier(SECRET, ISSUER, AUDIENCE, max_lifetime_s=3600)
    for good in (
        {"exp": now + 3600},
        {"exp": now + 3600, "iat": now},
        {"exp": now + 60, "iat": now - 3500.5},
    ):
        assert hour.verify(forge(HS256, claims(**good)))
    ten_years = now + 315_360_000
    too_long = (
        *(
            {"exp": exp, "iat": iat}
            for exp, iat in ((ten_years, now), (now + 60, now - 3600), (10**400, float(now)))
        ),
        *({"exp": exp} for exp in (ten_years, now + 3700, 10**400, 1e308)),
        {"exp": now + 60, "iat": -(10**400)},
    )
    for bad in too_long:
        with pytest.raises(LifetimeRefused):
            hour.verify(forge(HS256, claims(**bad)))
    assert VERIFIER.verify(forge(HS256, claims(exp=now + 86_400, iat=now)))
    with pytest.raises(LifetimeRefused):
        VERIFIER.verify(forge(HS256, claims(exp=now + 86_401, iat=now)))


def test_clocks_may_differ_by_five_seconds() -> None:
    now = time.time()
    assert VERIFIER.verify(forge(HS256, claims(exp=now - 2, iat=now + 2, nbf=now + 2)))
    refuse(forge(HS256, claims(exp=now - 6)))
    refuse(forge(HS256, claims(nbf=now + 30)))
    refuse(forge(HS256, claims(iat=now + 30)))


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"null", b"[]", b'"x"', b"7", b"\xff", b"[" * 5000, b'{"a":' * 1000, b"{}", b"\x00"],
)
def test_a_signed_payload_that_is_no_claims_stays_out(payload: bytes) -> None:
    refuse(forge(HS256, payload))


@pytest.mark.parametrize(
    "header",
    [
        {},
        *(
            {"alg": alg}
            for alg in ("", "none", "None", "NONE", "hs256", "HS384", "HS512", "RS256", "EdDSA", "dir")
        ),
        *({"alg": alg} for alg in (None, True, 7, ["HS256"], {"HS256": 1})),
        *({"alg": "HS256", "crit": crit} for crit in (["x"], "alg", 7, None, [7], [[]], ["exp"])),
        *({"alg": "HS256", "b64": b64_, "crit": ["b64"]} for b64_ in (False, "false")),
        {"alg": "HS256", "b64": False},
        {"alg": "HS256", "unknown": 1},
        {"alg": "HS256", "kid": 7},
        *("alg", ["alg"], 7, None, b"", b"{", b"\xff", b'{"alg":"none","alg":"none"}', b"[" * 380),
    ],
    ids=repr,
)
def test_odd_headers_stay_out_although_signed(header: Any) -> None:
    refuse(forge(header, claims()))


def test_a_public_key_is_no_secret() -> None:
    """Algorithm confusion: signed with a key of another kind, or with its public half as secret."""
    key = RSAKey.generate_key(2048)
    refuse(jwt.encode({"alg": "RS256"}, claims(), key))
    public = key.as_pem(private=False).decode()
    refuse(forge(HS256, claims(), secret=public))
    refuse(forge({**HS256, "jwk": key.as_dict(private=False)}, claims()))
    own = OctKey.import_key("b" * 32)
    refuse(forge({**HS256, "jwk": own.as_dict()}, claims(), secret="b" * 32))


def test_another_secret_stays_out() -> None:
    for secret in ("", "x", SECRET[:-1], SECRET + " ", SECRET.upper(), "\x00" * 32):
        refuse(forge(HS256, claims(), secret=secret))


def test_every_altered_character_is_refused() -> None:
    token = forge(HS256, claims())
    for position, character in enumerate(token):
        other = ("A", "B", "_", ".", "=", " ")[position % 6]
        if other != character:
            refuse(token[:position] + other + token[position + 1 :])


@pytest.mark.parametrize(
    "change",
    [
        *("", ".", "..", "...", "a.b.c", "Bearer {0}", " {0}", "{0} ", "{0}\n", "{0}\x00", "{0}="),
        *("{0}.", ".{0}", "{0}.{0}", "{0}é", "{0}\ud800", "٣.٣.٣", "null"),
    ],
    ids=repr,
)
def test_garbage_around_a_good_token(change: str) -> None:
    refuse(change.format(forge(HS256, claims())))


def test_without_a_signature_or_oversized_it_stays_out() -> None:
    signed = ".".join(b64(json.dumps(part).encode()) for part in ({"alg": "none"}, claims()))
    for token in (
        signed,
        f"{signed}.",
        f"{signed}.{b64(bytes(32))}",
        forge(HS256, claims(padding="x" * 8192)),
    ):
        refuse(token)


def test_a_short_secret_is_refused_and_none_is_shown() -> None:
    short = "x" * 31
    with pytest.raises(ValueError, match="32 bytes"):
        TokenVerifier(short, ISSUER, AUDIENCE)
    with pytest.raises(ValueError, match="32 bytes"):
        mint_token(secret=short, issuer=ISSUER, audience=AUDIENCE, subject="dr", roles=[])
    assert SECRET not in repr(VERIFIER) + repr(vars(VERIFIER))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CLAIM = st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "jti", "roles", "x"])
HEADER = st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk", "jku", "x5c", "cty", "zip"])


@settings(deadline=None, max_examples=60)
@given(changed=st.dictionaries(CLAIM, JSON, max_size=3), header=st.dictionaries(HEADER, JSON, max_size=2))
def test_any_signed_json_gets_in_or_gets_our_error(changed: dict[str, Any], header: dict[str, Any]) -> None:
    for token in (forge({**HS256, **header}, claims(**changed)), forge(header, changed)):
        with suppress(Unauthenticated):
            principal = VERIFIER.verify(token)
            assert check_subject(principal.subject)
            assert all(isinstance(role, str) for role in principal.roles)


@settings(deadline=None, max_examples=60)
@given(header=JSON, payload=st.binary(max_size=64) | JSON)
def test_any_signed_value_gets_our_error(header: Any, payload: Any) -> None:
    refuse(forge(header, payload))
