"""What is installed is what was locked, and the locks are of pyproject.toml as it is."""

from __future__ import annotations

from functools import cache
import hashlib
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
spec = spec_from_file_location("locks", REPOSITORY / "scripts" / "locks.py")
locks = sys.modules["locks"] = module_from_spec(spec)
spec.loader.exec_module(locks)
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
PIN = re.compile(r"[a-z0-9-]+==[0-9a-z.+]+( ; [^;]+)? \\")


def pinned(name, target) -> dict[str, str]:
    """The versions that one machine gets of a lock and those beneath it."""
    found = [Requirement(pin) for lock in (*locks.ALL[name].beneath, name) for pin in locks.pins(lock)]
    return {
        pin.name: str(pin.specifier).removeprefix("==")
        for pin in found
        if pin.marker is None or pin.marker.evaluate(target.markers)
    }


@cache
def needs(package, version) -> list[Requirement]:
    """What a package needs, where it is installed; which is depends on the environment that runs this."""
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return []
    return [Requirement(line) for line in installed.requires or ()] if installed.version == version else []


def applies(requirement, extras, target) -> bool:
    return requirement.marker is None or any(
        requirement.marker.evaluate(target.markers | {"extra": extra}) for extra in (extras or {""})
    )


@pytest.mark.parametrize("name", locks.ALL)
def test_a_lock_is_of_the_requirements_as_they_are_now(name):
    first = (locks.LOCKS / f"{name}.txt").read_text().splitlines()[0]
    assert locks.digest(name, PYPROJECT)[:16] in first, "pyproject.toml has changed: run scripts/lock"


@pytest.mark.parametrize("name", locks.ALL)
def test_a_lock_satisfies_its_requirements_and_theirs_on_every_machine(name):
    for target in locks.TARGETS:
        versions = pinned(name, target)
        todo, seen = [(Requirement(line), frozenset()) for line in locks.requirements(name, PYPROJECT)], set()
        while todo:
            requirement, extras = todo.pop()
            if (str(requirement), extras) in seen or not applies(requirement, extras, target):
                continue
            seen.add((str(requirement), extras))
            package = canonicalize_name(requirement.name)
            assert package in versions, f"{requirement} on {target}"
            assert requirement.specifier.contains(versions[package], prereleases=True), (
                f"{requirement}, {target}"
            )
            theirs = needs(package, versions[package])
            todo += [(one, frozenset(requirement.extras)) for one in theirs]


@pytest.mark.parametrize("name", locks.ALL)
def test_a_lock_names_versions_and_hashes_and_no_place(name):
    lines = (locks.LOCKS / f"{name}.txt").read_text().splitlines()
    body = [line for line in lines if not line.startswith("# ")]
    assert all(PIN.fullmatch(line) or HASH.fullmatch(line) for line in body)
    # Every pin has a hash below it.
    assert all(HASH.fullmatch(after) for line, after in pairwise(body) if PIN.fullmatch(line))
    assert HASH.fullmatch(body[-1])


def test_what_is_tested_is_what_serves_and_that_has_no_torch_and_no_pandas():
    versions: dict[str, set[str]] = {}
    for name, lock in locks.ALL.items():
        for pin in () if lock.alone else locks.pins(name):
            package, _, version = pin.partition(" ;")[0].partition("==")
            versions.setdefault(package, set()).add(version)
    assert [package for package, found in versions.items() if len(found) > 1] == []
    for name in ("serve", "cpu", "gpu", "vault", "kms"):
        assert not {"torch", "pandas"} & {pin.partition("==")[0] for pin in locks.pins(name)}


def wheel(path: Path, content: str) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("locked_thing.py", content)
        info = "locked_thing-1.0.dist-info"
        # It needs what nobody has: with a lock, nothing is resolved.
        needs = "Metadata-Version: 2.1\nName: locked-thing\nVersion: 1.0\nRequires-Dist: nobody-has-this\n"
        file.writestr(f"{info}/METADATA", needs)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        record = "".join(f"{name},,\n" for name in (*file.namelist(), f"{info}/RECORD"))
        file.writestr(f"{info}/RECORD", record)
    return path.read_bytes()


def test_a_file_that_is_not_the_locked_one_is_not_installed(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "locks").mkdir()
    (tmp_path / "index").mkdir()
    shutil.copy(REPOSITORY / "scripts" / "environment.sh", tmp_path / "scripts")
    file = tmp_path / "index" / "locked_thing-1.0-py3-none-any.whl"
    good = wheel(file, "GOOD = True\n")
    wheel(file, "import os\n")
    lock = f"locked-thing==1.0 \\\n    --hash=sha256:{hashlib.sha256(good).hexdigest()}\n"
    (tmp_path / "locks" / "thing.txt").write_text(lock)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    clean |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(file.parent), "PIP_CONFIG_FILE": os.devnull}

    def install():
        script = "set -euo pipefail; . scripts/environment.sh; environment .venv thing"
        command = ["bash", "-c", script]
        environment = clean | {"PYTHON": sys.executable}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    refused = install()
    assert refused.returncode == 1
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert "A file is not the one that was locked: nothing was installed." in refused.stderr
    assert not list((tmp_path / ".venv").rglob("locked_thing.py"))
    file.write_bytes(good)
    taken = install()
    assert taken.returncode == 0, taken.stderr
    thing = [str(tmp_path / ".venv" / "bin" / "python"), "-c", "import locked_thing; locked_thing.GOOD"]
    subprocess.run(thing, cwd=tmp_path, check=True)


def test_what_node_runs_in_the_tests_is_locked_by_its_digests_and_names_no_registry():
    folder = REPOSITORY / "tests" / "serve_app" / "fhir" / "medplum"
    stated = json.loads((folder / "package.json").read_text())["devDependencies"]
    packages = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert packages.pop("")["devDependencies"] == stated
    assert {name.removeprefix("node_modules/"): each["version"] for name, each in packages.items()} == stated
    for package in packages.values():
        assert re.fullmatch(r"sha512-[\w+/]{86}==", package["integrity"])
        assert "resolved" not in package
