"""docs/pms.md, pasted: from a token to a report in the EHR, in bash, against the service on a port."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
import re
import shutil
import sys

import pytest

from serve_app.settings import REPOSITORY
from tests.serve_app.conftest import SECRET
from tests.serve_app.http.test_private_logs import in_uvicorn

_PAGE = (REPOSITORY / "docs" / "pms.md").read_text()
_PART = _PAGE.partition("## From nothing to a report in the EHR")[2].partition("\n## ")[0]
#: The lines that come first, and then the command of each step.
FIRST = _PART.split("```")[1]
STEPS = re.findall(r"^\| \d \| ([^|:]+)[^|]* \| `(.+)` \|$", _PART, re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_each_step_works_as_it_is_pasted(service, service_urls, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    made = programs / "derm-cds"
    made.write_text(f'#!/bin/sh\ncd "{REPOSITORY}" && exec "{sys.executable}" -m cluster.cli "$@"\n')
    made.chmod(0o755)
    assert [name for name, _ in STEPS] == ["upload", "timeline", "review", "outcome", "worklist", "report"]
    environment = os.environ | {
        "DERM_HOME": str(tmp_path / "home"),
        "DERM_DATABASE_URL": service_urls.app,
        "DERM_OWNER_DATABASE_URL": service_urls.owner,
        "DERM_TOKEN_SECRET": SECRET,
    }
    async with in_uvicorn(service) as client:
        first = FIRST.replace("$PWD/.venv/bin", str(programs)).replace(
            "http://127.0.0.1:8000", str(client.base_url)
        )
        # An image of this folder's, for what the command draws is written where the code is.
        steps = [command.replace("lesion.jpg", f"{tmp_path}/lesion.jpg") for _, command in STEPS]
        text = "\n".join([first, *(step.replace("curl -sS", "curl -sS --fail-with-body") for step in steps)])
        shell = await asyncio.create_subprocess_exec(
            *("bash", "-euc", text),
            cwd=tmp_path,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await shell.communicate()
    assert shell.returncode == 0, said.decode()
    assert '"resourceType":"Bundle"' in said.decode().replace(" ", "")
