"""`derm-cds models` and `references`, as an operator types them."""

from __future__ import annotations

import json
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

import pytest

from cluster.cli import main
from serve_app.audit.events import os_account
from serve_app.records.health import INVARIANTS
from serve_app.settings import REPOSITORY
from tests.data_jobs.promotion.conftest import Rows, write_part
from tests.model_folders import RECIPES, copy_model, rewrite, thin_references

RECIPE = ("--recipe", str(RECIPES / "efficientnet_b4.toml"))


@pytest.fixture
def store(models: Path, model_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped model with 200 of its references, and the same under another tag with criteria that it meets."""
    folder = tmp_path / "models"
    copy_model(models / model_id, folder)
    rewrite(folder / model_id / "acceptance.json", json.dumps({"max_top1_loss": 0.0}).encode())
    thin_references(folder / model_id, 200)

    def own_space(content: dict[str, Any]) -> None:
        content["spaces"][0]["embedding_space"] = f"{content['model_id']}.space1"

    copy_model(folder / model_id, folder, "candidate", own_space)
    monkeypatch.setenv("DERM_MODELS", str(folder))
    return folder


@pytest.fixture
def cases(isic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive with four cases in the held-out fold."""

    def choose(rows: Rows) -> Rows:
        held = [row for row in rows if row["fold"] == "0"]
        chosen = [row for name in ("MEL", "NV") for row in [r for r in held if r["diagnosis"] == name][:2]]
        return chosen + [row for row in rows if row["fold"] != "0"]

    monkeypatch.setenv("DERM_ISIC_DIR", str(write_part(isic_dir, tmp_path, choose)))


def test_a_space_is_loaded_listed_verified_and_dropped_only_when_not_live(
    derm_cds, own_home, store, model_id, sql
) -> None:
    ambiguous = derm_cds("references", "load", home=own_home)
    assert (ambiguous.code, "say which, with --model" in ambiguous.err) == (1, True)
    load = ("references", "load", "--model", model_id)
    assert f"{model_id} answers; 200 references loaded" in derm_cds(*load, home=own_home).out
    assert "no new references loaded" in derm_cds("references", "load", home=own_home).out
    assert f"invariants  all {len(INVARIANTS)} hold" in derm_cds("status", home=own_home).out
    listed = derm_cds("references", "spaces", home=own_home).out
    assert listed.startswith("* ")
    assert "0 failures; filled by" in listed
    verified = derm_cds("references", "verify", model_id, home=own_home)
    assert verified.code == 0, verified.out
    assert verified.out.count(" ok  ") == 5
    space = listed.split()[1].rstrip(":")
    for name, said in ((space, "live model answers in"), ("no.space", "nothing in a space named")):
        dropped = derm_cds("references", "drop", name, home=own_home)
        assert (dropped.code, said in dropped.err) == (1, True)
    events = sql("SELECT action, actor, detail FROM audit_events ORDER BY event_id")
    assert [row["action"] for row in events] == ["references_load", "model_publish"]
    assert {row["actor"] for row in events} == {os_account()}
    assert events[0]["detail"]["embedding_space"] == space


@pytest.mark.usefixtures("cases")
def test_promote_roll_back_and_history(derm_cds, own_home, store, model_id, monkeypatch) -> None:
    candidate = f"{model_id.partition('.')[0]}.candidate"
    assert derm_cds("references", "load", "--model", model_id, home=own_home).code == 0
    who = ("--approved-by", "Dr Test", "--reason", "annual update 2026")
    live = derm_cds("models", "promote", model_id, *who, home=own_home)
    assert (live.code, live.out, live.err) == (1, "", f"derm-cds: {model_id} answers already.\n")
    with monkeypatch.context() as without:
        without.setenv("DERM_ISIC_DIR", str(store))
        refused = derm_cds("models", "promote", candidate, *who, home=own_home)
    assert (refused.code, "set DERM_ISIC_DIR" in refused.err) == (1, True)
    dry = derm_cds("models", "promote", candidate, *who, "--dry-run", "--threads", "1", home=own_home)
    assert dry.code == 0, dry.err
    assert "Changed cases: 0 of 4" in dry.out
    assert "nothing was changed" in dry.out
    said = derm_cds("models", "promote", candidate, *who, "--threads", "1", home=own_home)
    assert said.code == 0, said.err
    assert f"{candidate} answers from the next request on" in said.out
    assert json.loads((store / f"{candidate}.promotion.json").read_text())["approved_by"] == "Dr Test"
    # A report beside the folders is no model.
    assert derm_cds("models", "list", home=own_home).out.split() == sorted([model_id, candidate])
    unknown = derm_cds("models", "verify", "no.model", home=own_home)
    assert (unknown.code, "no.model" in unknown.err) == (1, True)
    back = derm_cds("models", "rollback", *who, home=own_home)
    assert back.out == f"{model_id} answers again from the next request on.\n"
    lines = derm_cds("models", "history", "--last", "3", home=own_home).out.splitlines()
    assert lines[0] == f"{model_id} answers"
    for line, told in (
        (1, "rollback"),
        (1, "by Dr Test: annual update 2026"),
        (2, "promote"),
        (2, ", report "),
    ):
        assert told in lines[line]


@pytest.mark.parametrize("action", ["promote x.y", "rollback", "promote x.y --approved-by"])
def test_who_approves_must_be_said(action: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["models", *action.split()])
    assert "--approved-by" in capsys.readouterr().err


def test_without_the_train_lock_import_says_what_to_install(derm_cds, tmp_path, monkeypatch) -> None:
    # The step runs in a process of its own: there, a package that fails to import stands for a missing one.
    (tmp_path / "onnx.py").write_text("raise ModuleNotFoundError(\"No module named 'onnx'\")\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    monkeypatch.setenv("DERM_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    source = tmp_path / "model.onnx"
    source.write_bytes(b"\x08\x09")
    said = derm_cds("models", "import", str(source), *RECIPE, home=tmp_path)
    assert said.code == 1
    assert "stop the service, then `DERM_LOCKS=jobs,test,train scripts/serve`" in said.err
    assert "pip install" not in said.err


def test_a_node_that_serves_lists_and_rolls_back_without_the_jobs_packages() -> None:
    program = """
import sys
for name in ("jinja2", "pandas", "remotezip", "scipy", "sklearn", "tenacity", "tomli_w", "tqdm"):
    sys.modules[name] = None
import cluster.commands.models, cluster.commands.references, cluster.prepare, data_jobs.promotion.rollback
from cluster.commands.models import load_job
from serve_app.domain.errors import DermError
try:
    load_job("data_jobs.promotion.promotion")
except DermError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "stop the service, then `DERM_LOCKS=jobs scripts/serve`" in ran.stdout


def test_nothing_tells_anybody_to_install_the_service_by_its_name_from_an_index() -> None:
    """Whoever took that name in a public index would be installed, past every lock."""
    places = ("serve_app", "cluster", "data_jobs", "model_store", "deployments", "graphs", "docs", "scripts")
    files = [
        path
        for place in places
        for path in (REPOSITORY / place).rglob("*")
        if path.suffix in {".py", ".md", ".sh", ""}
    ]
    said = [
        path
        for path in files
        if path.is_file() and re.search(rb"pip install .*pms-derm-cds", path.read_bytes())
    ]
    assert (len(files) > 100, said) == (True, [])
