"""`golden.json`: what an app developer tests an app against, in one file.

Uploads, the pixels they must become, and what the server's model and every copy answer; with
labels, thresholds, formulas and the preprocess contract, so that nothing else of this project
is needed but the copy itself and the statistics of p(UNK). The uploads are drawn by code, so that no patient's and
no archive's image is in them, and are PNG, because decoders of JPEG differ in the last bit.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
import hashlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_jobs.sample_lesion import draw_lesion
from data_jobs.training.scan import Pixels, Run
from deployments.classifier.calibration import Calibrator
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.pixels import PREPROCESS_VERSION, InputGeometry
from deployments.preprocess.preprocess import prepare_image
from model_store.edge_copies import server_contract
from model_store.manifest import Manifest
from model_store.registry import StoredModel
from serve_app.domain.assessment import Classification
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import ModelContractError

FORMAT = 1
#: How far logits of the same file may be from the expected ones on another processor: kernels sum
#: in another order, and a rounding that falls the other way moves an INT8 activation by one step.
#: Measured for INT8 on the golden images: integer kernels differ from exact arithmetic by at most
#: 0.03 with 7-bit weights, by 0.2 to 0.8 where 8-bit weights saturate.
TOLERANCES = {"float32": 0.001, "float16": 0.01, "int8": 0.15}

FORMULAS = {
    "eight": "softmax(logits / temperature), in the order of labels",
    "prediction_set": "every diagnosis d of the eight with eight[d] >= conformal_thresholds[d]; an empty set reads UNK",
    "ood_score": "min over the rows m of means of (b - m) @ precision @ (b - m) / 512, where b is the bottleneck; "
    "means and precision are arrays of the .npz that ood.statistics names",
    "p_unk": "1 / (1 + exp(-(ood.slope * ood_score + ood.intercept)))",
    "probabilities": "eight[d] * (1 - p_unk), and UNK: p_unk; the nine sum to 1",
    "operating_points": "flagged when the sum of eight[d] over the point's diagnoses is >= its threshold",
}

STEPS = (
    "Decode PNG or JPEG to 8 bits. Grey becomes RGB; of 16 bits the high byte is kept.",
    (
        "Reduce: with f = max(1, floor(short side / {twice})), replace each block of f×f pixels by its mean "
        "(Pillow's Image.reduce). A JPEG is first decoded at the coarsest of 1/1, 1/2, 1/4, 1/8 that keeps both "
        "sides at {twice} or more (libjpeg's DCT scaling)."
    ),
    "Lay transparency on white.",
    "Bring the colours of an embedded ICC profile to sRGB (perceptual); without one, or with a broken one, they are sRGB.",
    "Turn and mirror by the EXIF orientation, so that the image is upright. No tag, or a broken one, is 1.",
    "Squash the whole image to {side}×{side}, whatever its shape: no crop, no border.",
    (
        "The resize is Pillow's {filter} with antialiasing (Image.resize): a separable convolution, rows first, "
        "rounded to 8 bits after each pass; the kernel (bicubic: a = -0.5, support 2) is stretched by the scale "
        "when shrinking. Scalers without antialiasing give other pixels and other answers."
    ),
)


def preprocess_contract(manifest: Manifest) -> dict[str, Any]:
    """How an upload becomes pixels: for programs, and step by step for people."""
    side = manifest.input.input_size[1]
    return {
        "version": PREPROCESS_VERSION,
        "side": side,
        "layout": "uint8 RGB, 1×side×side×3; mean and std are inside the model",
        "aspect": manifest.input.aspect,
        "crop_pct": manifest.input.crop_pct,
        "interpolation": manifest.input.interpolation,
        "least_short_side": UploadLimits().min_side,
        "steps": [
            line.format(side=side, twice=2 * side, filter=manifest.input.interpolation) for line in STEPS
        ],
    }


def golden_document(model: StoredModel, server: Run, copies: Mapping[str, tuple[str, Run]]) -> dict[str, Any]:
    """The whole document; `copies` are precision and forward pass by name."""
    manifest = model.manifest
    if manifest.output.members > 1:
        raise ModelContractError(f"{manifest.model_id} is an ensemble; a device's copy is of one network.")
    geometry = InputGeometry.from_manifest(manifest.input)
    calibrator = Calibrator.from_model(model)
    uploads = draw_uploads()
    pixels = np.stack([prepare_image(u.png, geometry, UploadLimits()).pixels for u in uploads])
    outputs = server(pixels)
    answers = calibrator.classify(outputs)
    answered = {name: run(pixels)[0] for name, (_, run) in copies.items()}
    return {
        "format": FORMAT,
        "about": "Test vectors for apps that run an edge copy. The images are drawn; they show no patient.",
        "server": server_contract(model),
        "labels": [d.value for d in TRAINED],
        "preprocess": preprocess_contract(manifest),
        "temperature": manifest.calibration.temperature,
        "conformal_thresholds": {d.value: manifest.conformal.thresholds[d] for d in TRAINED},
        "ood": {
            "statistics": manifest.ood.statistics,
            "slope": manifest.ood.slope,
            "intercept": manifest.ood.intercept,
        },
        "operating_points": {
            name: {"diagnoses": [d.value for d in point.diagnoses], "threshold": point.threshold}
            for name, point in manifest.operating_points.items()
        },
        "formulas": FORMULAS,
        "logit_tolerance": {
            "server": TOLERANCES["float32"],
            **{name: TOLERANCES[precision] for name, (precision, _) in copies.items()},
        },
        "images": [
            {
                **_input(upload, prepared),
                "expected": _expected(manifest, answers[i], outputs.logits[i], outputs.bottleneck[i]),
                "copies": {name: {"logits": _rounded(found[i], 5)} for name, found in answered.items()},
            }
            for i, (upload, prepared) in enumerate(zip(uploads, pixels, strict=True))
        ],
    }


def _input(upload: GoldenUpload, prepared: Pixels) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(prepared).save(buffer, "PNG", optimize=True)
    return {
        "name": upload.name,
        "tests": upload.tests,
        "upload_png": base64.b64encode(upload.png).decode(),
        "prepared_png": base64.b64encode(buffer.getvalue()).decode(),
        "prepared_sha256": hashlib.sha256(prepared.tobytes()).hexdigest(),
    }


def _expected(
    manifest: Manifest, answer: Classification, logits: NDArray[np.float32], bottleneck: NDArray[np.float32]
) -> dict[str, Any]:
    known = 1.0 - answer.probabilities[Diagnosis.UNK]
    flagged = {
        name: sum(answer.probabilities[d] for d in point.diagnoses) / known >= point.threshold
        for name, point in manifest.operating_points.items()
    }
    return {
        "logits": _rounded(logits, 5),
        "bottleneck": _rounded(bottleneck, 4),
        "ood_score": round(answer.ood_score, 5),
        "p_unk": round(answer.probabilities[Diagnosis.UNK], 6),
        "probabilities": {d.value: round(p, 6) for d, p in answer.probabilities.items()},
        "prediction_set": [d.value for d in answer.prediction_set],
        "flagged": flagged,
    }


def _rounded(values: NDArray[np.float32], digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]


_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class GoldenUpload:
    """One upload: its name, what it tests, and the PNG file."""

    name: str
    tests: str
    png: bytes


def draw_uploads() -> list[GoldenUpload]:
    """All uploads, in the order of the document."""
    turned = Image.Exif()
    turned[_ORIENTATION] = 6
    return [
        GoldenUpload("landscape", "a lesion, wider than high: squashed to a square", _lesion((320, 240), 1)),
        GoldenUpload("portrait", "a lesion, higher than wide", _lesion((232, 310), 2)),
        GoldenUpload("square", "a lesion, already square", _lesion((256, 256), 3)),
        GoldenUpload("turned", "EXIF orientation 6: turned a quarter right before anything else",
                     _png(draw_lesion(size=(300, 226), seed=4), exif=turned.tobytes())),
        GoldenUpload("large", "over twice the input side: reduced by a whole factor before the resize", _large()),
        GoldenUpload("transparent", "a clear corner: laid on white", _transparent()),
        GoldenUpload("skin", "skin without a lesion", _png(_skin())),
        GoldenUpload("page", "not skin at all: p(UNK) must be high", _png(_page())),
    ]  # fmt: skip


def _png(image: Image.Image, exif: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **({} if exif is None else {"exif": exif}))
    return buffer.getvalue()


def _lesion(size: tuple[int, int], seed: int) -> bytes:
    return _png(draw_lesion(size=size, seed=seed))


def _large() -> bytes:
    """A small drawing in blocks of four pixels, so that the PNG stays small."""
    return _png(draw_lesion(size=(250, 196), seed=5).resize((1000, 784), Image.Resampling.NEAREST))


def _transparent() -> bytes:
    image = draw_lesion(size=(260, 230), seed=6).convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    ImageDraw.Draw(alpha).polygon([(0, 0), (90, 0), (0, 90)], fill=0)
    image.putalpha(alpha)
    return _png(image)


def _skin() -> Image.Image:
    random = np.random.default_rng(7)
    grain = random.normal(0.0, 2.0, (240, 240, 1))
    return Image.fromarray(np.clip(np.array([214.0, 172.0, 150.0]) + grain, 0, 255).astype(np.uint8))


def _page() -> Image.Image:
    """Lines of dark bars on white, like a printed page."""
    random = np.random.default_rng(8)
    image = Image.new("RGB", (300, 400), (250, 250, 248))
    draw = ImageDraw.Draw(image)
    for top in range(24, 380, 14):
        left = 20
        while left < 270:
            width = int(random.integers(8, 40))
            draw.rectangle((left, top, min(left + width, 280), top + 6), fill=(30, 30, 34))
            left += width + 7
    return image
