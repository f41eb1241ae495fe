from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="needs the train extra")
pytest.importorskip("skimage", reason="needs the train extra")
pytest.importorskip("sklearn", reason="needs the train extra")

from data_jobs.training.edge.build import ship
from data_jobs.training.edge.golden import draw_uploads

pytestmark = pytest.mark.torch


def test_a_copy_that_no_longer_passes_leaves_the_folder(tmp_path: Path) -> None:
    folder, made = tmp_path / "model", tmp_path / "made.onnx"
    made.write_bytes(b"new")
    folder.mkdir()
    for name in ("model.onnx", "model.int8.onnx", "model.float16.onnx"):
        (folder / name).write_bytes(b"old")
    ship(folder, {"float16": made}, {"edge.json": {"naïve": 1}})
    assert sorted(path.name for path in folder.iterdir()) == ["edge.json", "model.float16.onnx", "model.onnx"]
    assert (folder / "model.float16.onnx").read_bytes() == b"new"
    assert (folder / "model.onnx").read_bytes() == b"old"
    assert json.loads((folder / "edge.json").read_text()) == {"naïve": 1}


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        ship(tmp_path, {}, {"edge.json": {"ece": float("nan")}})


def test_the_same_code_draws_the_same_uploads() -> None:
    first, second = draw_uploads(), draw_uploads()
    assert first == second
    assert len({upload.name for upload in first}) == len(first) >= 8
