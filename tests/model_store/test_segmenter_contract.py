"""What a segmenter's folder must keep to be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import shutil
import tomllib
from typing import Any

import pytest
import tomli_w

from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore
from model_store.segmenter import open_segmenter
from serve_app.domain.errors import ModelContractError
from serve_app.settings import REPOSITORY

(SHIPPED,) = (REPOSITORY / "model_store" / "segmenters").iterdir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / SHIPPED.name))


def alter(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = tomllib.loads((folder / MANIFEST_NAME).read_text())
    change(content)
    (folder / MANIFEST_NAME).write_text(tomli_w.dumps(content))


def test_the_shipped_segmenter_is_small_and_no_model(folder: Path) -> None:
    stored = open_segmenter(folder)
    assert stored.manifest.model_id == folder.name
    assert (folder / stored.manifest.onnx).stat().st_size <= 3_000_000
    with pytest.raises(ModelContractError):
        ModelStore(folder.parent).open(folder.name)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(tag="another"), "architecture.tag"),
        (lambda c: c.update(modality="clinical"), "modality"),
        (lambda c: c["doubts"].update(confidence=float("nan")), "between 0 and 1"),
        (lambda c: c["doubts"].update(frame_share=1.5), "between 0 and 1"),
        (lambda c: c["doubts"].pop("main_share"), "main_share"),
        (lambda c: c["files"].pop("evaluation.json"), "no digest"),
        (lambda c: c.update(live=True), "live"),
    ],
)
def test_a_breach_is_refused(folder: Path, change: Callable[[dict[str, Any]], object], named: str) -> None:
    alter(folder, change)
    with pytest.raises(ModelContractError, match=named):
        open_segmenter(folder)


def test_another_graph_is_refused(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ModelContractError, match=r"model\.onnx"):
        open_segmenter(folder)
