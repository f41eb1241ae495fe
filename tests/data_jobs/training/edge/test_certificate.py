"""The gate, and figures that a hand can check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.dataset import LabelledImage
from data_jobs.training.edge.certificate import FoldImages, gate_problems, point_figures
from model_store.manifest import OperatingPoint
from serve_app.domain.diagnosis import TRAINED, Diagnosis

POINT = OperatingPoint((Diagnosis.MEL,), 0.1, 0.95, 0.5, 4, 0, "by hand")


@pytest.fixture
def images(make_row: Callable[..., LabelledImage]) -> FoldImages:
    """Two lesions that are melanoma, the first with two images, and a naevus."""
    named = (("one", 0), ("one", 0), ("two", 0), ("three", 1))
    rows = [replace(make_row(i, label), lesion_id=name) for i, (name, label) in enumerate(named)]
    return FoldImages("fold4", rows, np.zeros((4, 1, 1, 3), np.uint8))


def eight(melanoma: list[float]) -> np.ndarray:
    table = np.zeros((len(melanoma), 8))
    table[:, TRAINED.index(Diagnosis.MEL)] = melanoma
    table[:, TRAINED.index(Diagnosis.NV)] = 1 - np.array(melanoma)
    return table


def test_a_lesion_counts_by_its_less_favourable_image(images: FoldImages) -> None:
    found = point_figures(POINT, eight([0.9, 0.2, 0.5, 0.05]), eight([0.9, 0.05, 0.5, 0.2]), images)
    assert (found["positives"], found["newly_missed"], found["newly_found"]) == (2, 1, 0)
    assert (found["sensitivity_server"], found["sensitivity"]) == (1.0, 0.5)
    assert (found["specificity_server"], found["specificity"]) == (1.0, 0.0)
    # One found makes up for one missed, but both are told.
    found = point_figures(POINT, eight([0.9, 0.2, 0.05, 0.0]), eight([0.9, 0.05, 0.5, 0.0]), images)
    assert found["sensitivity"] == found["sensitivity_server"] == 0.5
    assert (found["newly_missed"], found["newly_found"]) == (1, 1)


@pytest.mark.parametrize(
    ("server", "copy", "passes"),
    [(0.9754, 0.9754, True), (0.975, 0.97, True), (0.9754, 0.97, False), (0.97, float("nan"), False)],
)
def test_half_a_point_is_allowed(server: float, copy: float, passes: bool) -> None:  # noqa: FBT001
    figures = {"operating_points": {"melanoma": {"sensitivity_server": server, "sensitivity": copy}}}
    problems = gate_problems("fold4", figures)
    assert (not problems) == passes
    assert all("melanoma sensitivity" in problem for problem in problems)


@pytest.mark.torch
def test_a_copy_that_no_longer_passes_leaves_the_folder(tmp_path: Path) -> None:
    build = pytest.importorskip("data_jobs.training.edge.build", reason="needs the train extra")
    folder, made = tmp_path / "model", tmp_path / "made.onnx"
    made.write_bytes(b"new")
    folder.mkdir()
    for name in ("model.onnx", "model.int8.onnx", "model.float16.onnx"):
        (folder / name).write_bytes(b"old")
    build.ship(folder, {"float16": made}, {"edge.json": {"naïve": 1}})
    assert sorted(path.name for path in folder.iterdir()) == ["edge.json", "model.float16.onnx", "model.onnx"]
    assert (folder / "model.float16.onnx").read_bytes() == b"new"
    assert (folder / "model.onnx").read_bytes() == b"old"
    assert json.loads((folder / "edge.json").read_text()) == {"naïve": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        build.ship(folder, {}, {"edge.json": {"ece": float("nan")}})
