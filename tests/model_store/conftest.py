"""The models there are, and copies of one with something wrong about it."""

from __future__ import annotations

from collections.abc import Callable
import os
from pathlib import Path
import shutil
import tomllib
from typing import Any

import pytest
import tomli_w

from model_store.manifest import MANIFEST_NAME

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def altered(models: Path, model_id: str, tmp_path: Path) -> Callable[..., Path]:
    """Copy the model and change its manifest; `(change) -> store`."""

    def copy(change: Change | None = None) -> Path:
        folder = tmp_path / "models" / model_id
        shutil.copytree(models / model_id, folder, copy_function=_link)
        manifest = folder / MANIFEST_NAME
        text = manifest.read_bytes()
        manifest.unlink()  # a hard link: the original stays as it is
        content = tomllib.loads(text.decode())
        if change is not None:
            change(content)
        manifest.write_text(tomli_w.dumps(content))
        return folder.parent

    return copy


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
