"""Two builds of the service never have the same name."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess

import pytest

from serve_app import version
from serve_app.domain.errors import InvalidSetting


def git(folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *who, *arguments]  # the same git that the service finds
    return subprocess.check_output(command, cwd=folder, env=environment, text=True).strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DERM_BUILD_COMMIT", raising=False)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_checkout_names_its_commit_and_says_when_it_was_changed(checkout: Path) -> None:
    first = git(checkout, "rev-parse", "HEAD")
    assert version.find_commit(checkout) == f"g{first[:12]}"
    (checkout / "code.py").write_text("two\n")
    assert version.find_commit(checkout) == f"g{first[:12]}.dirty"
    git(checkout, "tag", "v1")
    git(checkout, "commit", "--quiet", "-a", "-m", "second")
    second = version.find_commit(checkout)
    assert second == f"g{git(checkout, 'rev-parse', 'HEAD')[:12]}"
    assert second != f"g{first[:12]}"


def test_an_installed_package_has_what_it_was_built_with(checkout: Path) -> None:
    # Another project's checkout around an environment is not ours.
    installed = checkout / "lib"
    (installed / "serve_app").mkdir(parents=True)
    assert version.find_commit(installed) is None
    (installed / "serve_app" / "commit.txt").write_text("g0123456789ab.dirty\n")
    assert version.find_commit(installed) == "g0123456789ab.dirty"


def test_whoever_builds_an_image_without_the_checkout_names_the_commit(checkout, monkeypatch) -> None:
    monkeypatch.setenv("DERM_BUILD_COMMIT", "89abcdef0123456789abcdef0123456789abcdef")
    assert version.find_commit(checkout) == "g89abcdef0123"
    monkeypatch.setenv("DERM_BUILD_COMMIT", "main")
    with pytest.raises(InvalidSetting, match="DERM_BUILD_COMMIT"):
        version.find_commit(checkout)
