"""Reads golden.json as an app developer would: Pillow, numpy and a runtime; nothing of this project."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
import pytest


@pytest.fixture(scope="module")
def folder(models: Path, model_id: str) -> Path:
    return models / model_id


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict:
    return json.loads((folder / "golden.json").read_text())


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels_of(vector: dict) -> np.ndarray:
    return np.asarray(picture(vector["prepared_png"]))[None]


def prepare(upload: Image.Image, contract: dict) -> np.ndarray:
    side = contract["side"]
    factor = max(1, min(upload.size) // (2 * side))
    if factor > 1:
        upload = upload.reduce(factor)
    if upload.mode == "RGBA":
        white = Image.new("RGBA", upload.size, (255, 255, 255, 255))
        upload = Image.alpha_composite(white, upload)
    upright = ImageOps.exif_transpose(upload).convert("RGB")
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    return np.asarray(upright.resize((side, side), kernel[contract["interpolation"]]))


def conclude(golden: dict, statistics: dict, logits: np.ndarray, bottleneck: np.ndarray) -> dict:
    scaled = logits.astype(float) / golden["temperature"]
    eight = np.exp(scaled - scaled.max())
    eight /= eight.sum()
    named = dict(zip(golden["labels"], eight, strict=True))
    away = bottleneck.astype(float) - statistics["means"]
    score = ((away @ statistics["precision"]) * away).sum(1).min() / bottleneck.size
    unknown = 1 / (1 + np.exp(-(golden["ood"]["slope"] * score + golden["ood"]["intercept"])))
    limits = golden["conformal_thresholds"]
    return {
        "p_unk": unknown,
        "probabilities": {d: p * (1 - unknown) for d, p in named.items()} | {"UNK": unknown},
        "prediction_set": [d for d in golden["labels"] if named[d] >= limits[d]],
        "flagged": {
            name: sum(named[d] for d in point["diagnoses"]) >= point["threshold"]
            for name, point in golden["operating_points"].items()
        },
    }


def test_the_uploads_become_the_expected_pixels(golden: dict) -> None:
    assert len(golden["images"]) >= 8
    for vector in golden["images"]:
        prepared = prepare(picture(vector["upload_png"]), golden["preprocess"])
        assert hashlib.sha256(prepared.tobytes()).hexdigest() == vector["prepared_sha256"], vector["name"]
        assert np.array_equal(prepared[None], pixels_of(vector))


def test_onnx_runtime_answers_as_expected(golden: dict, folder: Path) -> None:
    """The served graph; a copy is held to its own answers whenever it is opened (`model_store.edge_copies`)."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    statistics = np.load(folder / golden["ood"]["statistics"])
    for vector in golden["images"]:
        logits, bottleneck = session.run(["logits", "bottleneck"], {"pixels": pixels_of(vector)})
        expected = vector["expected"]
        assert np.abs(logits[0] - expected["logits"]).max() <= golden["logit_tolerance"]["server"]
        assert np.abs(bottleneck[0] - expected["bottleneck"]).max() < 1e-3
        answer = conclude(golden, statistics, logits[0], bottleneck[0])
        assert answer["prediction_set"] == expected["prediction_set"]
        assert answer["flagged"] == expected["flagged"]
        assert answer["p_unk"] == pytest.approx(expected["p_unk"], abs=1e-4)
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
        assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_what_is_no_skin_is_unknown_and_skin_is_less_so(golden: dict) -> None:
    unknown = {vector["name"]: vector["expected"]["p_unk"] for vector in golden["images"]}
    assert unknown["page"] > 0.5
    assert unknown["page"] > unknown["landscape"]


@pytest.mark.torch
def test_litert_answers_as_expected(golden: dict, folder: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(folder / "model.tflite"), num_threads=1)
    run = interpreter.get_signature_runner()
    for vector in golden["images"]:
        answer = run(pixels=pixels_of(vector))
        difference = np.abs(answer["logits"][0] - vector["copies"]["litert"]["logits"]).max()
        assert difference <= golden["logit_tolerance"]["litert"], vector["name"]
        assert answer["bottleneck"].shape == (1, 512)
