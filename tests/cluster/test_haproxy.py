"""HAProxy's start script: Ray's own template, on loopback."""

from __future__ import annotations

import os
from pathlib import Path
import re
import subprocess
import warnings

import pytest

import cluster

_SCRIPT = Path(cluster.__file__).with_name("haproxy")


@pytest.fixture(scope="module")
def template() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve._private import haproxy_templates
    text = "\n".join(value for value in vars(haproxy_templates).values() if isinstance(value, str))
    for name, value in {"metrics_port": "9101", "stats_port": "8404", "socket_path": "/run/s"}.items():
        text = text.replace(f"{{{{ config.{name} }}}}", value)
    return text


def _start(config: Path, *, program: str = "/bin/true") -> subprocess.CompletedProcess:
    command = [_SCRIPT, "-db", "-f", config, "-sf", "1"]
    return subprocess.run(
        command, env=os.environ | {"DERM_HAPROXY": program}, check=False, capture_output=True
    )


def test_metrics_and_statistics_move_to_loopback(tmp_path, template) -> None:
    assert re.search(r"^ *bind :9101$", template, re.MULTILINE)
    assert re.search(r"^ *bind \*:8404$", template, re.MULTILINE)
    config = tmp_path / "with a space.cfg"
    config.write_text(template)
    assert _start(config).returncode == 0
    written = config.read_text()
    assert re.search(r"^ *bind 127\.0\.0\.1:9101$", written, re.MULTILINE)
    assert re.search(r"^ *bind 127\.0\.0\.1:8404$", written, re.MULTILINE)
    assert not re.search(r"^ *bind \*?:\d+ *$", written, re.MULTILINE)


def test_the_admin_socket_is_for_this_user(tmp_path, template) -> None:
    config = tmp_path / "cfg"
    config.write_text(template)
    _start(config)
    (line,) = re.findall(r"^ *stats socket /run/s.*$", config.read_text(), re.MULTILINE)
    assert "mode 600 level admin" in line


def test_nobody_is_told_the_routes(tmp_path, template) -> None:
    assert len(re.findall(r"^ *http-request return .* if routes$", template, re.MULTILINE)) == 1
    config = tmp_path / "cfg"
    config.write_text(template)
    _start(config)
    (line,) = re.findall(r"^ *http-request return .* if routes$", config.read_text(), re.MULTILINE)
    assert line.strip() == "http-request return status 404 if routes"


def test_arguments_and_exit_code_are_haproxys(tmp_path) -> None:
    config = tmp_path / "cfg"
    config.write_text("global\n")
    done = _start(config, program="/bin/echo")
    assert done.stdout.decode().strip() == f"-db -f {config} -sf 1"
    assert _start(config, program="/bin/false").returncode == 1
    assert config.read_text() == "global\n"
