"""Write locks/*.txt: the exact versions and hashes that are installed, from the requirements in pyproject.toml.

Only uv resolves, and only here (scripts/lock); what installs a lock resolves nothing. A version that is locked stays
until it no longer fits, or `--upgrade` or `--upgrade-package NAME` lets go of it. A lock names files by their SHA-256
alone: no index, so that a mirror will do. It has the wheels for the machines of TARGETS and no source archives.
"""  # noqa: INP001 - a script

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
import hashlib
from pathlib import Path
import re
import subprocess
import sys
from tempfile import TemporaryDirectory
import tomllib
from typing import Any

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = REPOSITORY / "locks"
#: The newest glibc whose wheels are taken: Debian 12's.
_GLIBC_MINOR = 36


@dataclass(frozen=True, slots=True)
class Lock:
    """One file. `extras`: what it is resolved from, with the project's own requirements unless `alone`.

    `beneath`: locks that are installed with it; what they have, it does not repeat.
    """

    extras: tuple[str, ...]
    beneath: tuple[str, ...] = ()
    alone: bool = False


#: All but the tools' hold the same version of a package: what is tested is what serves.
ALL: dict[str, Lock] = {
    "serve": Lock(()),
    "cpu": Lock(("cpu",), ("serve",)),
    "gpu": Lock(("gpu",), ("serve",)),
    "vault": Lock(("vault",), ("serve",)),
    "kms": Lock(("kms",), ("serve",)),
    "jobs": Lock(("cpu", "jobs"), ("serve", "cpu")),
    "test": Lock(("cpu", "jobs", "test"), ("serve", "cpu", "jobs")),
    "train": Lock(("cpu", "jobs", "test", "train", "edge"), ("serve", "cpu", "jobs", "test")),
    "audit": Lock(("audit",), alone=True),
    "build": Lock(("build",), alone=True),
}
_WHOLE = ("cpu", "jobs", "test", "train", "edge", "vault", "kms")


@dataclass(frozen=True, slots=True)
class Target:
    """A machine that a lock is for: CPython on Linux with glibc."""

    python: tuple[int, int]
    machine: str

    def __str__(self) -> str:
        return f"Python {self.python[0]}.{self.python[1]} on {self.machine}"

    @property
    def markers(self) -> dict[str, str]:
        """What environment markers are evaluated with."""
        version = f"{self.python[0]}.{self.python[1]}"
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{version}.9",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{version}.9",
            "python_version": version,
            "sys_platform": "linux",
        }


@cache
def wheel_tags(target: Target) -> frozenset[Tag]:
    """The wheels that pip takes there."""
    platforms = [
        *(f"manylinux_2_{minor}_{target.machine}" for minor in range(5, _GLIBC_MINOR + 1)),
        *(f"manylinux{name}_{target.machine}" for name in ("2014", "2010", "1")),
        f"linux_{target.machine}",
    ]
    interpreter = f"cp{target.python[0]}{target.python[1]}"
    own = cpython_tags(target.python, [interpreter], platforms)
    return frozenset(own) | frozenset(compatible_tags(target.python, interpreter, platforms))


TARGETS = tuple(
    Target((3, minor), machine) for minor in (11, 12, 13, 14) for machine in ("x86_64", "aarch64")
)


def requirements(name: str, pyproject: Mapping[str, Any]) -> list[str]:
    """What a lock is resolved from, as pyproject.toml states it."""
    lock = ALL[name]
    if name == "build":
        # As hatchling asks for it when it makes an editable install.
        return [*pyproject["build-system"]["requires"], "editables~=0.3"]
    project = pyproject["project"]
    stated = [] if lock.alone else list(project["dependencies"])
    return stated + [line for extra in lock.extras for line in project["optional-dependencies"][extra]]


def digest(name: str, pyproject: Mapping[str, Any]) -> str:
    """SHA-256 of the requirements, by which a lock that is no longer theirs is told."""
    return hashlib.sha256("\n".join(sorted(requirements(name, pyproject))).encode()).hexdigest()


def pins(name: str, folder: Path = LOCKS) -> list[str]:
    """`name==version ; marker` of a lock, without hashes; none where there is no such file."""
    path = folder / f"{name}.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line.removesuffix("\\").strip() for line in lines if re.match(r"[a-z0-9]", line)]


def main(arguments: Sequence[str]) -> int:
    """Resolve everything as one, then write each lock with those versions."""
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    LOCKS.mkdir(exist_ok=True)
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        whole = [*pyproject["project"]["dependencies"]]
        whole += [line for extra in _WHOLE for line in pyproject["project"]["optional-dependencies"][extra]]
        (folder / "whole.in").write_text("\n".join(whole), encoding="utf-8")
        held = [pin for name, lock in ALL.items() if not lock.alone for pin in pins(name)]
        _resolve(folder / "whole.in", folder / "whole.txt", dict.fromkeys(held), *arguments)
        for name, lock in ALL.items():
            stated = folder / f"{name}.in"
            stated.write_text("\n".join(requirements(name, pyproject)), encoding="utf-8")
            exact = folder / f"{name}.txt"
            if lock.alone:
                _resolve(stated, exact, pins(name), *arguments)
            else:
                _resolve(stated, exact, pins(name), *arguments, "--constraint", str(folder / "whole.txt"))
            # The same again, now with every file's name beside its hash.
            named = folder / f"pylock.{name}.toml"
            _resolve(exact, named, (), "--no-deps", "--format", "pylock.toml")
            below = {pin for other in lock.beneath for pin in pins(other)}
            blocks = _blocks(name, tomllib.loads(named.read_text(encoding="utf-8"))["packages"])
            kept = [block for pin, block in blocks if pin not in below]
            head = f"# Made by scripts/lock of requirements {digest(name, pyproject)[:16]}: do not edit.\n"
            if lock.beneath:
                head += f"# Beside {', '.join(f'{other}.txt' for other in lock.beneath)}.\n"
            (LOCKS / f"{name}.txt").write_text(head + "".join(kept), encoding="utf-8")
            print(f"locks/{name}.txt: {len(kept)} packages")
    return 0


def _resolve(stated: Path, output: Path, held: Sequence[str] | Mapping[str, None], *options: str) -> None:
    """Run uv; `held` are versions that it keeps where it can. Exits with what it says when it finds no way."""
    if held:
        output.write_text("\n".join(held), encoding="utf-8")
    uv = str(Path(sys.executable).with_name("uv"))
    command = [
        *(uv, "pip", "compile", str(stated), "--output-file", str(output)),
        *("--universal", "--python-version", "3.11", "--fork-strategy", "fewest", "--only-binary", ":all:"),
        *("--no-header", "--no-annotate", "--quiet", *options),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _blocks(name: str, packages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each package that some target needs: its pin, and the lines of the lock; says where a target has no wheel."""
    for package in packages:
        marker = Marker(package["marker"]) if "marker" in package else None
        targets = [target for target in TARGETS if marker is None or marker.evaluate(target.markers)]
        if not targets:
            continue
        pin = f"{package['name']}=={package['version']}"
        hashes = set()
        for target in targets:
            tags = wheel_tags(target)
            found = {
                wheel["hashes"]["sha256"]
                for wheel in package.get("wheels", ())
                if tags & parse_wheel_filename(wheel["url"].rpartition("/")[2])[3]
            }
            if not found:
                print(f"locks/{name}.txt: {pin} has no wheel for {target}", file=sys.stderr)
            hashes |= found
        if len(targets) < len(TARGETS):
            pin += f" ; {marker}"
        yield pin, " \\\n".join([pin, *(f"    --hash=sha256:{value}" for value in sorted(hashes))]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
