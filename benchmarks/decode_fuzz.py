"""Mutated images against the decoder: none may crash it, hang it, or raise what is not a rejection.

`python -m benchmarks.decode_fuzz --count 100000`: seeds are drawn, and taken from the corpus where
there is one. Children with limits on memory and time decode; a child that dies or overruns is a
finding, and the image that did it is kept. The same --seed makes the same images.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
from random import Random
import resource
import signal
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

from benchmarks.decode_mutations import draw_seeds, mutate, read_seeds
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from serve_app.domain.errors import RejectedUpload
from serve_app.settings import REPOSITORY

#: Address space of a child: Python, numpy and Pillow map 0.5 GiB; a 40-megapixel image takes 0.4.
MEMORY_BYTES = 2 * 1024**3
#: One image may take this long, seconds (facts: 0.75 s was the slowest of 6,087 hostile files).
HANG_S = 10.0
_BATCH = 500
_GEOMETRY, _LIMITS = InputGeometry(64), UploadLimits(min_side=1)


@dataclass(slots=True)
class Findings:
    """What came of the images: by outcome, by mutation, and every image that should not have done so."""

    outcomes: Counter[str] = field(default_factory=Counter)
    mutations: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: dict[str, Any]) -> None:
        """Take in what one child reported."""
        self.outcomes.update(part["outcomes"])
        self.mutations.update(part["mutations"])
        self.slowest_s = max(self.slowest_s, part["slowest_s"])
        self.failures.extend(part["failures"])


@dataclass(frozen=True, slots=True)
class Seeds:
    """Images to start from. Half the time it is a drawn one: most of the corpus is broken already."""

    drawn: list[bytes]
    corpus: list[bytes]

    @classmethod
    def gather(cls, corpus: Path | None) -> Seeds:
        """Draw some, and read the corpus's where there is one."""
        return cls(list(draw_seeds()), read_seeds(corpus) if corpus else [])

    def mutated(self, number: int, seed: int) -> tuple[bytes, str]:
        """Make one mutated image and name the mutation: the same for the same number, seed and corpus."""
        dice = Random(f"{seed}-{number}")
        first, second = (
            dice.choice(self.corpus if self.corpus and dice.random() < 0.5 else self.drawn) for _ in range(2)
        )
        return mutate(first, second, dice)


def fuzz(count: int, *, seed: int, corpus: Path | None, keep: Path | None = None) -> Findings:
    """Decode `count` mutated images in children; a child that ended early is replaced behind its last image."""
    findings, number = Findings(), 0
    while number < count:
        end = min(number + _BATCH, count)
        number = _run_child(number, end, seed, corpus, findings)
    if keep is not None and findings.failures:
        seeds = Seeds.gather(corpus)
        keep.mkdir(parents=True, exist_ok=True)
        for failure in findings.failures:
            name = f"{seed}-{failure['number']}"
            (keep / name).write_bytes(seeds.mutated(failure["number"], seed)[0])
    return findings


def _run_child(start: int, end: int, seed: int, corpus: Path | None, findings: Findings) -> int:
    """Run one child over numbers start to end; returns the first number that it did not finish."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.decode_fuzz",
        "--child",
        f"{start}:{end}",
        "--seed",
        str(seed),
    ]
    command += ["--corpus", str(corpus)] if corpus else []
    with tempfile.TemporaryDirectory(prefix="derm-fuzz-") as folder:
        notes = Path(folder) / "notes.json"
        # The child's own alarm ends it within a hanging image; this stands behind it.
        try:
            child = subprocess.run(
                [*command, "--notes", str(notes)],
                cwd=REPOSITORY,
                stderr=subprocess.PIPE,
                check=False,
                timeout=60 + (end - start) * HANG_S / 10,
            )
            ended = f"exit status {child.returncode}: {child.stderr.decode(errors='replace')[-300:]}"
        except subprocess.TimeoutExpired:
            ended = "did not end"
        if not notes.exists():
            raise RuntimeError(f"The child did not start: {ended}")
        reached = json.loads(notes.read_text())
    findings.add(reached)
    if reached["next"] < end:
        findings.outcomes["crashed or hung"] += 1
        findings.failures.append({"number": reached["next"], "error": ended})
        return int(reached["next"]) + 1
    return end


def _decode_range(start: int, end: int, seed: int, seeds: Seeds, notes: Path) -> None:
    """The child: decode under limits, and note after each image how far it came."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The default action ends the process even inside a C loop, which a Python handler would wait for.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    findings = Findings()
    with notes.open("w") as output:
        for number in range(start, end):
            data, name = seeds.mutated(number, seed)
            _note(output, findings, number)
            signal.setitimer(signal.ITIMER_REAL, HANG_S)
            since = perf_counter()
            outcome = _decode(data, number, findings)
            signal.setitimer(signal.ITIMER_REAL, 0)
            findings.slowest_s = max(findings.slowest_s, perf_counter() - since)
            findings.outcomes[outcome] += 1
            findings.mutations[name] += 1
        _note(output, findings, end)


def _decode(data: bytes, number: int, findings: Findings) -> str:
    try:
        prepare_image(data, _GEOMETRY, _LIMITS)
    except RejectedUpload as rejection:
        return rejection.code
    except Exception as error:  # noqa: BLE001 - whatever else comes out is what this run looks for
        findings.failures.append({"number": number, "error": f"{type(error).__name__}: {error}"[:300]})
        return "not a rejection"
    return "accepted"


def _note(output: Any, findings: Findings, number: int) -> None:  # noqa: ANN401
    """Write down what is known before the next image: this is what a crash leaves."""
    line = {
        "outcomes": findings.outcomes,
        "mutations": findings.mutations,
        "slowest_s": findings.slowest_s,
        "failures": findings.failures,
        "next": number,
    }
    output.seek(0)
    output.truncate()
    output.write(json.dumps(line))
    output.flush()


def _default_corpus() -> Path | None:
    folder = Path(os.environ.get("DERM_CORPORA_DIR", REPOSITORY.parent / "shared" / "corpora")) / "images"
    return folder if folder.is_dir() else None


def main() -> None:
    """Run and print JSON; exit status 1 when anything but an image or a rejection came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="of mutated images")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=_default_corpus(), help="folder of more seeds")
    parser.add_argument("--keep", type=Path, default=Path("decode-failures"), help="where findings go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        start, end = map(int, parsed.child.split(":"))
        _decode_range(start, end, parsed.seed, Seeds.gather(parsed.corpus), parsed.notes)
        return
    started = perf_counter()
    findings = fuzz(parsed.count, seed=parsed.seed, corpus=parsed.corpus, keep=parsed.keep)
    seeds = Seeds.gather(parsed.corpus)
    report = {
        "benchmark": "decode_fuzz",
        "images": findings.outcomes.total(),
        "seeds": {"drawn": len(seeds.drawn), "corpus": len(seeds.corpus)},
        "outcomes": dict(findings.outcomes.most_common()),
        "mutations": dict(findings.mutations.most_common()),
        "slowest_s": round(findings.slowest_s, 3),
        "seconds": round(perf_counter() - started, 1),
        "failures": findings.failures,
        "passed": not findings.failures,
    }
    print(json.dumps(report, indent=2))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
