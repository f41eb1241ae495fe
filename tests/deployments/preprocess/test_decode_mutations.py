"""Two thousand mutated images of `benchmarks.decode_fuzz`, which runs a hundred thousand."""

from __future__ import annotations

from benchmarks.decode_fuzz import HANG_S, Seeds, fuzz

COUNT = 2_000


def test_mutated_images_are_images_or_rejections(capsys) -> None:
    findings = fuzz(COUNT, seed=20261124, corpus=None)
    assert findings.failures == []
    assert findings.outcomes.total() == COUNT
    assert findings.slowest_s < HANG_S
    # Both doors are tried: what is still a picture, and what is none any more.
    assert findings.outcomes["accepted"] > COUNT / 50
    assert findings.outcomes["undecodable_image"] > COUNT / 5
    assert len(findings.mutations) == 9
    with capsys.disabled():
        print(f"\n{COUNT} mutated images: {dict(findings.outcomes)}, slowest {findings.slowest_s:.2f} s")


def test_the_same_number_is_the_same_image() -> None:
    first, second = Seeds.gather(None), Seeds.gather(None)
    assert [first.mutated(n, 7) for n in range(50)] == [second.mutated(n, 7) for n in range(50)]
    assert len({first.mutated(n, 7)[0] for n in range(200)}) > 190
