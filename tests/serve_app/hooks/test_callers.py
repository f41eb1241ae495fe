"""Which EHR is let in: asymmetric tokens of listed issuers for the called address, each once; nothing else learns anything."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from pathlib import Path
import socket
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jws
from joserfc.jwk import ECKey, OctKey, RSAKey
import pytest

from serve_app.domain.errors import Unauthenticated
from serve_app.hooks.service import FEEDBACK_PATH, SERVICE_PATH
from serve_app.settings import find_untrustworthy, read_hooks
from tests.serve_app.hooks.conftest import BASE, DOCTOR, USER, view
from tests.serve_app.http.test_fuzz import json_values


async def test_discovery_is_anyones_and_tells_nothing_of_patients(hooked, service) -> None:
    answer = await hooked.client.get("/cds-services")
    (found,) = answer.json()["services"]
    assert (answer.status_code, found["hook"], found["id"]) == (200, "patient-view", "derm-open-demands")
    assert found.keys() == {"hook", "id", "title", "description", "usageRequirements"}
    assert "access-control-allow-origin" not in answer.headers
    assert await hooked.events(answer) == []
    # Where no EHR is configured there is no service, and nobody is asked who they are.
    answer = await service.client.get("/cds-services")
    assert (answer.status_code, answer.json()) == (200, {"services": []})
    for path in (SERVICE_PATH, FEEDBACK_PATH):
        async with service.storing_nothing(events=0):
            service.hold_to_problem(await service.client.post(path, json={}), 404, "not_found")


async def test_an_unknown_service_is_not_found(west) -> None:
    for path in ("/cds-services/another", "/cds-services/another/feedback"):
        west.service.hold_to_problem(await west.post(view("p"), path), 404, "not_found")


@pytest.mark.parametrize("algorithm", ["ES384", "RS384", "ES256", "RS256"])
async def test_each_of_the_four_algorithms_gets_in(
    start_service, clients_file, west, algorithm, tmp_path
) -> None:
    made = {"ES384": (ECKey, "P-384"), "ES256": (ECKey, "P-256")}.get(algorithm, (RSAKey, 2048))
    key = made[0].generate_key(made[1], {"kid": "one"})
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [key.as_dict(private=False)]}))
    file = tmp_path / "hooks.toml"
    file.write_text(
        f'base_url = "{BASE}"\n[clients.north]\nissuer = "https://north.example"\njwks = "keys.json"\n'
    )
    async with start_service(hooks_clients=file) as service:
        token = west.token(key=key, algorithm=algorithm, header={"kid": "one"}, iss="https://north.example")
        headers = {"Authorization": f"Bearer {token}"}
        answer = await service.client.post(SERVICE_PATH, json=view("p"), headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"cards": []})


async def test_keys_over_https_and_a_jku_that_is_listed(east) -> None:
    assert (await east.look("nobody")).status_code == 200
    # Without it, too: it is optional.
    assert (await east.look("nobody", token=east.token(header={"jku": None}))).status_code == 200
    audiences = [f"{BASE}{SERVICE_PATH}", "https://other.example"]
    assert (await east.look("nobody", token=east.token(aud=audiences))).status_code == 200


def _unsigned(ehr) -> str:
    parts = ehr.token().split(".")
    header = _encoded(b'{"alg":"none","kid":"west-1","typ":"JWT"}')
    return f"{header}.{parts[1]}.{parts[2]}"


def _half_a_character(ehr) -> str:
    """JSON can say what no UTF-8 can."""
    claims = {
        "iss": ehr.issuer,
        "aud": f"{BASE}{SERVICE_PATH}",
        "iat": (now := int(time.time())),
        "exp": now + 100,
    }
    header = {"alg": ehr.algorithm, "kid": ehr.key.kid, "typ": "JWT"}
    text = json.dumps(claims | {"jti": "\ud800"})
    return jws.serialize_compact(header, text, ehr.key, algorithms=[ehr.algorithm])


def _confused(ehr) -> str:
    """Signed by HMAC with the public key, which everybody has, as the secret; by hand, for joserfc would not."""
    claims = ehr.token().split(".")[1]
    header = _encoded(b'{"alg":"HS256","kid":"west-1","typ":"JWT"}')
    signed = f"{header}.{claims}"
    secret = ehr.key.as_pem(private=False)
    return f"{signed}.{_encoded(hmac.digest(secret, signed.encode(), 'sha256'))}"


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def now() -> int:
    return int(time.time())


REFUSED = {
    "another's key": lambda ehr: ehr.token(key=ECKey.generate_key("P-384", {"kid": "west-1"})),
    "an unknown key": lambda ehr: ehr.token(
        key=ECKey.generate_key("P-384", {"kid": "x"}), header={"kid": "x"}
    ),
    "a key of its own in the header": lambda ehr: ehr.token(
        key=(key := ECKey.generate_key("P-384", {"kid": "x"})),
        header={"kid": "x", "jwk": key.as_dict(private=False)},
    ),
    "unsigned": _unsigned,
    "symmetric": _confused,
    "symmetric, a short secret": lambda ehr: ehr.token(key=OctKey.import_key("x" * 64), algorithm="HS384"),
    "another algorithm": lambda ehr: ehr.token(
        key=RSAKey.generate_key(2048, {"kid": "west-1"}), algorithm="RS512"
    ),
    "no kid": lambda ehr: ehr.token(header={"kid": None}),
    "another type": lambda ehr: ehr.token(header={"typ": "at+jwt"}),
    "unknown issuer": lambda ehr: ehr.token(iss="https://evil.example"),
    "no issuer": lambda ehr: ehr.token(iss=None),
    "another EHR's issuer": lambda ehr: ehr.token(iss="https://cloud.example", tenant="hospital-7"),
    "the base": lambda ehr: ehr.token(aud=BASE),
    "discovery": lambda ehr: ehr.token(aud=f"{BASE}/cds-services"),
    "feedback": lambda ehr: ehr.token(FEEDBACK_PATH),
    "another service": lambda ehr: ehr.token(aud=f"{BASE}/cds-services/x"),
    "another host": lambda ehr: ehr.token(aud=f"https://evil.example{SERVICE_PATH}"),
    "no audience": lambda ehr: ehr.token(aud=None),
    "expired": lambda ehr: ehr.token(iat=now() - 400, exp=now() - 100),
    "for longer than five minutes": lambda ehr: ehr.token(iat=now(), exp=now() + 301),
    "not yet": lambda ehr: ehr.token(iat=now() + 3000, exp=now() + 3100),
    "no exp": lambda ehr: ehr.token(exp=None),
    "no iat": lambda ehr: ehr.token(iat=None),
    "no jti": lambda ehr: ehr.token(jti=None),
    "an empty jti": lambda ehr: ehr.token(jti=""),
    "a jti that is no text": lambda ehr: ehr.token(jti=7),
    "an endless jti": lambda ehr: ehr.token(jti="x" * 256),
    "a jti of half a character": _half_a_character,
    "a clinician's own": lambda ehr: ehr.service.token(DOCTOR)["Authorization"].removeprefix("Bearer "),
    "rubbish": lambda _: "a.b.c",
    "nested": lambda _: f"{base64.urlsafe_b64encode(b'[' * 5000).decode()}.e30.x",
}


@pytest.mark.parametrize("case", REFUSED)
async def test_any_other_token_is_refused_and_learns_nothing(west, lesion, case) -> None:
    hooked = west.service
    taken = await hooked.owner.fetchval("SELECT count(*) FROM hook_tokens")
    async with hooked.storing_nothing():
        answer = await west.look(lesion["fhir"], token=REFUSED[case](west))
    code = "token_lifetime_refused" if case == "for longer than five minutes" else "unauthenticated"
    body = hooked.hold_to_problem(answer, 401, code)
    assert not any(word in json.dumps(body) for word in (lesion["fhir"], lesion["patient_id"], USER))
    event = await hooked.hold_to_event(answer, "authenticate", "denied")
    assert (event["actor"], event["patient_id"], event["purpose"]) == ("unauthenticated", None, None)
    # What was never let in fills no memory.
    assert await hooked.owner.fetchval("SELECT count(*) FROM hook_tokens") == taken


def _compact(*parts: object) -> str:
    return ".".join(_encoded(json.dumps(part).encode()) for part in parts)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    token=st.text(max_size=80)
    | st.builds(_compact, json_values, json_values, json_values)
    | st.builds(
        _compact,
        st.fixed_dictionaries(
            {"alg": st.just("ES384") | json_values, "kid": st.just("west-1") | json_values}
        ),
        st.fixed_dictionaries({"iss": st.just("https://west.example") | json_values, "jti": json_values}),
        st.binary(max_size=99).map(lambda value: value.hex()),
    )
)
async def test_whatever_a_token_is_it_is_refused(hooked, token) -> None:
    with pytest.raises(Unauthenticated):
        await hooked.app.state.services.hooks.clients.identify(token, SERVICE_PATH)


async def test_no_token_at_all(hooked) -> None:
    answer = await hooked.client.post(SERVICE_PATH, json=view("p"))
    hooked.hold_to_problem(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("ehr", ["west", "east"])
async def test_an_address_in_a_token_is_never_asked(request, ehr) -> None:
    """Nor is one that differs in a letter from the one that is listed."""
    found = request.getfixturevalue(ehr)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.3)
        address = f"https://127.0.0.1:{listening.getsockname()[1]}/jwks.json"
        for header in ({"jku": address}, {"x5u": address, "jku": address}):
            answer = await found.look("p", token=found.token(header=header))
            found.service.hold_to_problem(answer, 401, "unauthenticated")
        with pytest.raises(TimeoutError):
            listening.accept()


async def test_tenants_of_one_issuer_are_told_apart(east) -> None:
    for tenant in (None, "hospital-8", ["hospital-7"]):
        answer = await east.look("p", token=east.token(tenant=tenant))
        east.service.hold_to_problem(answer, 401, "unauthenticated")


async def test_a_token_is_good_for_one_request_at_whichever_replica(
    west, start_service, clients_file, lesion
) -> None:
    """Also where the request that it came with was refused; two EHRs may have the same jti."""
    token = west.token()
    assert (await west.look(lesion["fhir"], token=token)).json()["cards"]
    async with west.service.storing_nothing():
        answer = await west.look(lesion["fhir"], token=token)
    west.service.hold_to_problem(answer, 401, "token_replayed")
    event = await west.service.hold_to_event(answer, "authenticate", "denied")
    assert event["detail"] == {"code": "token_replayed", "client": "127.0.0.1"}
    async with start_service(hooks_clients=clients_file) as replica:
        again = await replica.client.post(
            SERVICE_PATH, json=view("p"), headers={"Authorization": f"Bearer {token}"}
        )
        replica.hold_to_problem(again, 401, "token_replayed")
    token = west.token()
    answers = await asyncio.gather(*(west.look(lesion["fhir"], token=token) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, *[401] * 5]
    broken = west.token()
    assert (await west.post(b"{", token=broken)).status_code == 400
    assert (await west.look("p", token=broken)).status_code == 401


async def test_taken_tokens_are_kept_longer_than_they_are_valid_and_no_longer(west, east) -> None:
    both = {"jti": "the same"}
    assert (await west.look("p", token=west.token(**both))).status_code == 200
    assert (await east.look("p", token=east.token(**both))).status_code == 200
    hooked, count = west.service, "SELECT count(*) FROM hook_tokens"
    forget = hooked.app.state.services.hooks.forget_tokens
    await hooked.owner.execute("UPDATE hook_tokens SET seen_at = now() - interval '14 minutes'")
    before = await hooked.owner.fetchval(count)
    await forget()
    assert await hooked.owner.fetchval(count) == before
    await hooked.owner.execute("UPDATE hook_tokens SET seen_at = now() - interval '16 minutes'")
    await forget()
    assert await hooked.owner.fetchval(count) == 0
    assert "hook_tokens" in hooked.app.state.services.worker.describe()


async def test_an_ehr_that_asks_too_often_waits_and_strangers_fill_no_log(
    start_service, clients_file, west
) -> None:
    bounds = {"rate_limit_per_s": 0.01, "rate_limit_burst": 2, "unauthenticated_per_minute": 3}
    async with start_service(hooks_clients=clients_file, **bounds) as limited:

        async def ask(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            return (await limited.client.post(SERVICE_PATH, json=view("p"), headers=headers)).status_code

        assert [await ask(west.token()) for _ in range(4)] == [200, 200, 429, 429]
        assert [await ask("x.y.z") for _ in range(5)] == [401, 401, 401, 429, 429]


WHOLE = f'base_url = "{BASE}"\n[clients.west]\nissuer = "https://west.example"\njwks = "west.json"\n'
BAD = {
    "no TOML": "base_url = ",
    "no base": WHOLE.replace(f'base_url = "{BASE}"\n', ""),
    "a base with a query": WHOLE.replace(BASE, f"{BASE}?a=1"),
    "credentials": WHOLE.replace(BASE, "https://me:you@derm.example"),
    "an unknown key": WHOLE + 'secret = "x"\n',
    "a symmetric algorithm": WHOLE + 'algorithms = ["HS256"]\n',
    "no algorithm": WHOLE + "algorithms = []\n",
    "no keys": WHOLE.replace('jwks = "west.json"\n', ""),
    "a name that is none": WHOLE.replace("clients.west", 'clients."West Ehr"'),
    "a page without its encounter": WHOLE + 'encounter_page = "https://west.example/"\n',
    "a page that is no page": WHOLE + 'encounter_page = "javascript:{encounter_id}"\n',
    "one issuer twice": WHOLE + '[clients.two]\nissuer = "https://west.example"\njwks = "west.json"\n',
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_clients_is_read_strictly(tmp_path, case) -> None:
    file = tmp_path / "hooks.toml"
    file.write_text(BAD[case])
    with pytest.raises(ValueError, match="DERM_HOOKS_CLIENTS"):
        read_hooks(file)


def test_a_path_of_keys_is_as_seen_from_the_file(tmp_path) -> None:
    file = tmp_path / "hooks.toml"
    file.write_text(
        WHOLE + '[clients.two]\nissuer = "https://two.example"\njwks = "https://two.example/keys"\n'
    )
    found = read_hooks(file).clients
    assert (found["west"].jwks, found["two"].jwks) == (
        str(tmp_path / "west.json"),
        "https://two.example/keys",
    )


@pytest.mark.parametrize("writable", ["hooks.toml", "west.json"])
def test_a_file_that_others_can_change_is_named(settings, tmp_path: Path, writable) -> None:
    (tmp_path / "hooks.toml").write_text(WHOLE)
    (tmp_path / "west.json").write_text("{}")
    changed = settings.model_copy(update={"hooks_clients": tmp_path / "hooks.toml"})
    before = find_untrustworthy(changed)
    (tmp_path / writable).chmod(0o666)
    (said,) = set(find_untrustworthy(changed)) - set(before)
    assert said.startswith("DERM_HOOKS_CLIENTS")
    assert writable in said


@pytest.mark.parametrize(
    "line",
    [f'base_url = "{BASE.replace("https", "http")}"', 'source_url = "http://a.example"'],
    ids=["base", "source"],
)
def test_production_wants_https(settings, tmp_path, line) -> None:
    file = tmp_path / "hooks.toml"
    whole = WHOLE if line.startswith("source") else WHOLE.partition("\n")[2]
    file.write_text(f"{line}\n{whole}")
    values = settings.model_dump() | {"hooks_clients": file, "token_secret": "J" * 20 + "qwertyuiopasdfghjkl"}
    assert type(settings)(**values).hooks_clients == file
    with pytest.raises(ValueError, match="https in production"):
        type(settings)(**values | {"env": "production"})
