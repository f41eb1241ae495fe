"""Dermoscopic originals as a clinician sends them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from serve_app.domain.diagnosis import Diagnosis


async def test_every_original_is_answered_in_full(
    start_service, local_stages, isic_dir: Path, capsys
) -> None:
    # Every fourth: each is the same way, and megabytes long.
    files = sorted((isic_dir / "uploads").iterdir())[::4]
    assert files
    outcomes: Counter[str] = Counter()
    async with start_service(local_stages(answer_all=False)) as service:
        patient = await service.care()
        for path in files:
            response = await service.upload(patient, image=path.read_bytes(), name=path.name)
            assert response.status_code == 201, f"{path.name}: {response.text}"
            answer = response.json()
            service.hold_to("AssessmentDocument", answer)
            outcomes[answer["outcome"]] += 1
            assert all(answer["provenance"].values())
            assert answer["outcome"] != "refused", f"{path.name}: {answer['reasons']}"
            probabilities = answer["classification"]["probabilities"]
            assert list(probabilities) == list(Diagnosis)
            assert abs(sum(probabilities.values()) - 1) < 1e-9
            assert len(answer["similar"]) == 10
            assert all(case["diagnosis"] and case["copyright_license"] for case in answer["similar"])
            assert all(case["attribution"] for case in answer["similar"])
    with capsys.disabled():
        print(f"\n{len(files)} originals: {dict(outcomes)}")
