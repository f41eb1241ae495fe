"""The actor of a command is the account that runs it, whatever the environment says."""

from __future__ import annotations

import os
from pathlib import Path
import pwd
import subprocess
import sys

import pytest

from serve_app.audit.events import os_account

REPOSITORY = Path(__file__).resolve().parents[3]
FORGED = {"LOGNAME": "somebody", "USER": "somebody", "LNAME": "somebody", "SUDO_UID": "4242"}


def test_the_environment_does_not_say_who_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FORGED.items():
        monkeypatch.setenv(name, value)
    assert os_account() == f"os:{pwd.getpwuid(os.getuid()).pw_name}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who has no name")
def test_an_account_without_a_name_is_its_number() -> None:
    code = (
        "import os; from serve_app.audit.events import os_account;"
        "os.setresuid(54321, 54321, 54321); print(os_account())"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.check_output(command, env={**os.environ, **FORGED}, cwd=REPOSITORY, text=True)
    assert said == "os:54321\n"
