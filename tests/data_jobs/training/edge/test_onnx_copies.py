"""The conversions, on the model that ships and the golden pictures: no archive is needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from data_jobs.training.edge.golden import draw_uploads
from data_jobs.training.edge.litert import GraphModule
from data_jobs.training.edge.onnx_copies import (
    measure_ranges,
    plain_graph,
    write_float16,
    write_int8,
)
from data_jobs.training.scan import open_onnx
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from model_store.registry import StoredModel
from serve_app.domain.errors import ModelContractError

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def pixels(model: StoredModel) -> np.ndarray:
    geometry = InputGeometry.from_manifest(model.manifest.input)
    return np.stack([prepare_image(u.png, geometry, UploadLimits()).pixels for u in draw_uploads()[:4]])


@pytest.fixture(scope="module")
def plain(model: StoredModel) -> onnx.ModelProto:
    return plain_graph(model.path(model.manifest.onnx), model.manifest.input.input_size[1])


@pytest.fixture(scope="module")
def served(model: StoredModel, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return open_onnx(model.path(model.manifest.onnx), threads=1)(pixels)


def test_the_plain_graph_answers_as_the_served_one(plain, pixels, served, tmp_path: Path) -> None:
    counts = Counter(node.op_type for node in plain.graph.node)
    assert not {"Pad", "Shape", "BatchNormalization", "Constant"} & set(counts)
    onnx.save(plain, tmp_path / "plain.onnx")
    found = open_onnx(tmp_path / "plain.onnx", threads=1)(pixels)
    for one, other in zip(found[:2], served[:2], strict=True):
        assert np.abs(one - other).max() < 1e-4


def test_the_torch_twin_answers_as_the_graph(plain, pixels, served) -> None:
    with torch.inference_mode():
        found = GraphModule(plain.graph).eval()(torch.from_numpy(pixels))
    assert np.abs(found["logits"].numpy() - served[0]).max() < 1e-4
    assert np.abs(found["bottleneck"].numpy() - served[1]).max() < 1e-4
    odd = onnx.ModelProto()
    odd.CopyFrom(plain)
    next(node for node in odd.graph.node if node.op_type == "Add").op_type = "Erf"
    with pytest.raises(ModelContractError, match="no torch twin for Erf"):
        GraphModule(odd.graph)(torch.from_numpy(pixels[:1]))


def test_half_float_weights_halve_the_file(plain, pixels, served, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    write_float16(plain, path)
    assert path.stat().st_size < 0.52 * plain.ByteSize()
    logits, bottleneck, *_ = open_onnx(path, threads=1)(pixels)
    assert np.abs(logits - served[0]).max() < 0.05
    assert np.abs(bottleneck - served[1]).max() < 0.05


def test_static_quantisation_keeps_the_contract(plain, pixels, served, tmp_path: Path) -> None:
    ranges = measure_ranges(plain, pixels[:2])
    assert all(low <= 0.0 <= high for low, high in ranges.values())
    path = tmp_path / "int8.onnx"
    write_int8(plain, ranges, ("/reduce/", "/classify/"), path)
    assert path.stat().st_size < 0.45 * plain.ByteSize()
    logits, bottleneck, *_ = open_onnx(path, threads=1)(pixels)
    assert logits.shape == served[0].shape
    assert bottleneck.shape == served[1].shape
    with pytest.raises(ValueError, match="No node is named nowhere"):
        write_int8(plain, ranges, ("nowhere",), path)
