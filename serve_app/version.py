"""Which build of the service this is: in every answer's provenance, so that two builds are told apart."""

from __future__ import annotations

from functools import cache
from importlib import metadata
import os
from pathlib import Path
import re
import subprocess

from serve_app.domain.errors import InvalidSetting

_COMMIT = re.compile(r"([0-9a-f]{12})[0-9a-f]*(-dirty)?")


def package_version() -> str:
    """The version in pyproject.toml."""
    return metadata.version("pms-derm-cds")


@cache
def service_version() -> str:
    """The package's version and its commit: `0.1.0+g0123456789ab`, with `.dirty` where files differ from that.

    The version alone where no commit is known. The first call may run git, so a process makes it when it starts.
    """
    commit = find_commit(Path(__file__).resolve().parent.parent)
    return f"{package_version()}+{commit}" if commit else package_version()


def find_commit(root: Path) -> str | None:
    """The commit of the code in a folder: as DERM_BUILD_COMMIT says, the checkout, or what the wheel was built with.

    Raises InvalidSetting for a DERM_BUILD_COMMIT that is no commit of at least 12 hex digits.
    """
    if stated := os.environ.get("DERM_BUILD_COMMIT"):
        if commit := _format(stated):
            return commit
        raise InvalidSetting("DERM_BUILD_COMMIT must be a commit of 12 to 40 hex digits.")
    built_with = root / "serve_app" / "commit.txt"
    if built_with.exists():
        return built_with.read_text(encoding="utf-8").strip()
    # Without one of its own, the folder may lie in the checkout of something else.
    return _format(_describe(root)) if (root / ".git").exists() else None


def _describe(root: Path) -> str:
    # Not the repository that a hook of git's points at; and no lock, others may be at work in the checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", f"safe.directory={root}", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            [*command, "--exclude=*", "--abbrev=12"],
            cwd=root,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or it does not want to
        return ""


def _format(commit: str) -> str | None:
    found = _COMMIT.fullmatch(commit)
    return f"g{found[1]}{'.dirty' if found[2] else ''}" if found else None
