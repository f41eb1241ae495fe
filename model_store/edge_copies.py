"""The copies of a model for edge devices: what their certificates rest on, and opening one.

`edge.json` of a model folder lists them with their certificates. It and every copy are files
that the manifest vouches for, so an altered byte is refused when the model is opened.
"""

from __future__ import annotations

import base64
from dataclasses import replace
import io
import json
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_store.registry import StoredModel
from model_store.session import InferenceSession
from serve_app.domain.errors import ModelContractError

EDGE_NAME = "edge.json"
GOLDEN_NAME = "golden.json"

Runtime = Literal["onnxruntime", "litert"]


def server_contract(model: StoredModel) -> dict[str, Any]:
    """What a certificate depends on besides the copy: the server's graph and what reads its answers."""
    manifest = model.manifest
    return {
        "model_id": manifest.model_id,
        "onnx_sha256": manifest.files[manifest.onnx].sha256,
        "input_size": list(manifest.input.input_size),
        "temperature": manifest.calibration.temperature,
        "conformal_thresholds": {d.value: t for d, t in manifest.conformal.thresholds.items()},
        "ood": {
            "statistics_sha256": manifest.files[manifest.ood.statistics or manifest.onnx].sha256,
            "slope": manifest.ood.slope,
            "intercept": manifest.ood.intercept,
        },
        "operating_points": {name: p.threshold for name, p in manifest.operating_points.items()},
    }


def open_copy(model: StoredModel, name: str, *, threads: int) -> InferenceSession:
    """A session over an ONNX copy: the same inputs, outputs and checks as over the server's model.

    Raises ModelContractError for an unknown copy, one certified against another server model or calibration,
    one that is not the certified file or another runtime's, and one that does not give its golden answers on
    this processor.
    """
    model_id, files = model.manifest.model_id, model.manifest.files
    try:
        listed = json.loads(model.path(EDGE_NAME).read_bytes())
        served, copies = listed["server"], listed["copies"]
        golden = json.loads(model.path(GOLDEN_NAME).read_bytes())
        if name not in copies:
            raise ModelContractError(f"{model_id} has no edge copy {name!r}; it has {', '.join(copies)}.")
        file, runtime, digest = (copies[name][key] for key in ("file", "runtime", "sha256"))
        tolerance = float(golden["logit_tolerance"][name])
        expected = np.array([image["copies"][name]["logits"] for image in golden["images"]])
        pixels = np.stack([_decode(image["prepared_png"]) for image in golden["images"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelContractError(
            f"{EDGE_NAME} or {GOLDEN_NAME} of {model_id}: {type(error).__name__}."
        ) from error
    if served != server_contract(model):
        raise ModelContractError(
            f"The edge copies of {model_id} were certified against another model or calibration: "
            "run data_jobs.training.edge.build."
        )
    if file not in files or files[file].sha256 != digest:
        raise ModelContractError(f"{file} is not the file that {EDGE_NAME} was written for.")
    if runtime != "onnxruntime":
        raise ModelContractError(f"{file} runs on {runtime}, not on ONNX Runtime.")
    session = InferenceSession(replace(model, manifest=replace(model.manifest, onnx=file)), threads=threads)
    difference = float(np.abs(session.run(pixels)[0] - expected).max())
    # A comparison that is false for not-a-number, so that it is refused.
    if not difference <= tolerance:
        raise ModelContractError(
            f"The edge copy {name} of {model_id} answers otherwise on this processor than where it "
            f"was certified: a logit differs by {difference:.3f}, {tolerance} is allowed. Use another copy."
        )
    return session


def _decode(text: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
