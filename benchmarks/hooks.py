"""How long CDS Hooks take, and whether the time tells an unknown patient from one who is in nobody's care here.

`python -m benchmarks.hooks`: the application in this process over the embedded PostgreSQL, without a network; the cases
take turns in random order, and the same clinician's `GET /api/lesions` of a patient goes with them as the baseline.
`apart` is how often one of the first is slower than one of the second (0.5: no telling), beside the range in which 95 of
100 such figures fall where there is no difference at all.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from itertools import combinations
import json
import os
from pathlib import Path
import random
import tempfile
from time import perf_counter, time
from typing import Any
from uuid import uuid4

import httpx
from joserfc import jwt
from joserfc.jwk import ECKey
import numpy as np
from pydantic import SecretStr

from benchmarks.baseline import LocalStages
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from data_jobs.references.load import publish_bundled
from deployments.preprocess.decode import UploadLimits
from deployments.risk.policy import CURRENT_VERSION
from model_store.registry import ModelStore
from serve_app.access.tokens import mint_token
from serve_app.hooks.service import SERVICE_PATH
from serve_app.http.app import create_app
from serve_app.records.hooks import HookStore, Identity
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.settings import Settings, make_development_secret, model_folder

BASE, ISSUER, USER, DOCTOR = "https://derm.example", "https://ehr.example", "Practitioner/1", "dr-1"
LESIONS = 5
#: Patients with five lesions of three images, each with a demand; of the first half the doctor takes care.
_FILL = """
WITH patient AS (SELECT 'p-' || n AS patient_id, n FROM generate_series(1, $1::integer) AS n),
lesion AS (
    INSERT INTO lesions (lesion_id, patient_id, created_at)
    SELECT gen_random_uuid(), patient_id, now() FROM patient CROSS JOIN generate_series(1, $2::integer)
    RETURNING lesion_id, patient_id
),
image AS (
    INSERT INTO lesion_images (image_id, lesion_id, patient_id, created_at, content_type, width, height, data_key_id, sealed)
    SELECT gen_random_uuid(), lesion_id, patient_id, now(), 'image/png', 1, 1, gen_random_uuid(), 'x'
    FROM lesion CROSS JOIN generate_series(1, 3)
    RETURNING image_id
),
assessment AS (
    INSERT INTO assessments (assessment_id, image_id, created_at, outcome, failure, completed_at, context, top_k, licences,
        actor, request_id, demand_level, demand_urgency)
    SELECT gen_random_uuid(), image_id, now(), 'failed', 'integrity', now(), '{}', 1, '{}', 'a', 'r', 'high', 'urgent'
    FROM image
)
INSERT INTO care_assignments (patient_id, clinician, starts_at)
SELECT patient_id, $3, now() - interval '1 day' FROM patient WHERE n <= $1 / 2
"""

Ask = Callable[[], Awaitable[httpx.Response]]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--patients", type=int, default=2000)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="derm-hooks-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        try:
            report = asyncio.run(_run(home, postgres.ensure(), parsed.rounds, parsed.patients))
        finally:
            postgres.stop()
    print(json.dumps(report, indent=2))


async def _run(home: Path, urls: DatabaseUrls, rounds: int, patients: int) -> dict[str, Any]:
    key, secret, models = ECKey.generate_key("P-384", {"kid": "1"}), make_development_secret(), model_folder()
    (home / "jwks.json").write_text(json.dumps({"keys": [key.as_dict(private=False)]}))
    (home / "hooks.toml").write_text(
        f'base_url = "{BASE}"\n[clients.ehr]\nissuer = "{ISSUER}"\njwks = "jwks.json"\npatient_ids = "same"\n'
    )
    await migrate(urls.owner, application_role="derm_app")
    await publish_bundled(urls.owner, models, next(iter(ModelStore(models))))
    owner = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=120)
    settings = Settings(
        home=home,
        database_url=SecretStr(urls.app),
        token_secret=SecretStr(secret),
        hooks_clients=home / "hooks.toml",
        rate_limit_per_s=1e6,
        rate_limit_burst=1_000_000,
    )
    stages = LocalStages(models=models, limits=UploadLimits(), threads=1, policy_version=CURRENT_VERSION)
    app = create_app(settings, stages)
    token = mint_token(
        secret=secret, issuer="derm-cds", audience="derm-cds", subject=DOCTOR, roles=["clinician"]
    )
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://derm", timeout=60) as client,
    ):
        # Now, for no service starts on images whose keys it does not have.
        await owner.execute(_FILL, patients, LESIONS, DOCTOR)
        await owner.execute(
            "INSERT INTO care_assignments VALUES ('p-none', $1, now() - interval '1 day')", DOCTOR
        )
        await HookStore(owner).map([Identity("ehr", "user", USER, DOCTOR)])
        await owner.execute("ANALYZE")

        def hook(patient: Callable[[], str], user: str = USER) -> Callable[[], Ask]:
            """Sign a token and write a body, and leave the sending, which is what is measured."""

            def prepare() -> Ask:
                now = int(time())
                claims = {
                    "iss": ISSUER,
                    "aud": f"{BASE}{SERVICE_PATH}",
                    "iat": now,
                    "exp": now + 300,
                    "jti": str(uuid4()),
                }
                signed = jwt.encode({"alg": "ES384", "kid": "1"}, claims, key, algorithms=["ES384"])
                context = {"userId": user, "patientId": patient()}
                body = {"hook": "patient-view", "hookInstance": str(uuid4()), "context": context}
                headers = {"Authorization": f"Bearer {signed}"}
                return lambda: client.post(SERVICE_PATH, json=body, headers=headers)

            return prepare

        def listed() -> Ask:
            query, headers = {"patient_id": in_care()}, {"Authorization": f"Bearer {token}"}
            return lambda: client.get("/api/lesions", params=query, headers=headers)

        def in_care() -> str:
            return f"p-{random.randint(1, patients // 2)}"

        def in_no_care() -> str:
            return f"p-{random.randint(patients // 2 + 1, patients)}"

        cases: dict[str, Callable[[], Ask]] = {
            f"{LESIONS} cards": hook(in_care),
            "in care, nothing due": hook(lambda: "p-none"),
            "no care": hook(in_no_care),
            "unknown patient": hook(lambda: f"q-{random.randint(1, patients)}"),
            "unknown user": hook(in_care, "Practitioner/2"),
            "baseline: GET /api/lesions": listed,
        }
        times = await _measure(cases, rounds)
    await owner.close()
    spread = 1.96 * np.sqrt((2 * rounds + 1) / (12 * rounds**2))
    same = ("no care", "unknown patient", "unknown user", "in care, nothing due")
    return {
        "benchmark": "hooks",
        "cores": os.cpu_count(),
        "patients": patients,
        "rounds": rounds,
        "ms": {
            name: {f"p{p}": round(float(np.percentile(found, p)), 2) for p in (50, 95, 99)}
            for name, found in times.items()
        },
        "apart": {f"{a} / {b}": round(_slower(times[a], times[b]), 3) for a, b in combinations(same, 2)},
        "no telling": [round(0.5 - spread, 3), round(0.5 + spread, 3)],
    }


async def _measure(cases: dict[str, Callable[[], Ask]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-20, rounds):  # the first are not counted
        for name, prepare in random.sample(list(cases.items()), len(cases)):
            ask = prepare()
            since = perf_counter()
            answer = await ask()
            took = (perf_counter() - since) * 1000
            answer.raise_for_status()
            if "cards" in answer.json() and bool(answer.json()["cards"]) is not name.endswith("cards"):
                raise SystemExit(f"{name}: {answer.text}")
            if number >= 0:
                times[name].append(took)
    return times


def _slower(first: list[float], second: list[float]) -> float:
    """Mann and Whitney's U, as a share: how often one of the first is slower than one of the second."""
    return float((np.array(first)[:, None] > np.array(second)[None, :]).mean())


if __name__ == "__main__":
    main()
