"""The copies of a model for edge devices: which there are, and opening one.

`edge.json` of a model folder lists them with their certificates. It and every copy are files
that the manifest vouches for, so an altered byte is refused when the model is opened, and once
more when a copy is read.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
import hashlib
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

Runtime = Literal["onnxruntime", "litert"]


@dataclass(frozen=True, slots=True)
class EdgeCopy:
    """One copy: its file, what runs it, its precision, and what it was certified with.

    `certificate` holds the figures of `data_jobs.training.edge.certificate`.
    """

    name: str
    file: str
    runtime: Runtime
    precision: str
    bytes: int
    sha256: str
    certificate: dict[str, Any]


def list_copies(model: StoredModel) -> tuple[EdgeCopy, ...]:
    """The shipped copies of a verified model, none when it has no `edge.json`.

    Raises ModelContractError when `edge.json` was made for another server model or another
    calibration, or names a file that the manifest does not vouch for with the same digest.
    """
    manifest = model.manifest
    if EDGE_NAME not in manifest.files:
        return ()
    try:
        content = json.loads(model.path(EDGE_NAME).read_bytes())
        served = content["server"]
        copies = tuple(
            EdgeCopy(name=name, **{key: entry[key] for key in _FIELDS})
            for name, entry in content["copies"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelContractError(f"{EDGE_NAME} of {manifest.model_id}: {type(error).__name__}.") from error
    if served != server_contract(model):
        raise ModelContractError(
            f"The edge copies of {manifest.model_id} were certified against another model or calibration: "
            "run data_jobs.training.edge.build."
        )
    for copy in copies:
        vouched = manifest.files.get(copy.file)
        if vouched is None or (vouched.bytes, vouched.sha256) != (copy.bytes, copy.sha256):
            raise ModelContractError(f"{copy.file} is not the file that {EDGE_NAME} was written for.")
    return copies


_FIELDS = ("file", "runtime", "precision", "bytes", "sha256", "certificate")


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
            "statistics_sha256": manifest.files[manifest.ood.statistics].sha256,
            "slope": manifest.ood.slope,
            "intercept": manifest.ood.intercept,
        },
        "operating_points": {name: p.threshold for name, p in manifest.operating_points.items()},
    }


def find_copy(model: StoredModel, name: str) -> EdgeCopy:
    """The copy of this name. Raises ModelContractError where there is none."""
    copies = {copy.name: copy for copy in list_copies(model)}
    if name not in copies:
        has = ", ".join(copies) or "none"
        raise ModelContractError(f"{model.manifest.model_id} has no edge copy {name!r}; it has {has}.")
    return copies[name]


def read_copy(model: StoredModel, copy: EdgeCopy) -> bytes:
    """The bytes of a copy, checked again: what is read is what was certified."""
    try:
        content = model.path(copy.file).read_bytes()
    except OSError as error:
        raise ModelContractError(f"{copy.file} cannot be read: {error.strerror}.") from error
    if hashlib.sha256(content).hexdigest() != copy.sha256:
        raise ModelContractError(f"{copy.file} is not the file its certificate names.")
    return content


def open_copy(model: StoredModel, name: str, *, threads: int) -> InferenceSession:
    """A session over an ONNX copy: the same inputs, outputs and checks as over the server's model.

    Raises ModelContractError for an altered file, another runtime's copy, or a copy that does
    not give the certified answers on this processor.
    """
    copy = find_copy(model, name)
    if copy.runtime != "onnxruntime":
        raise ModelContractError(f"{copy.file} runs on {copy.runtime}, not on ONNX Runtime.")
    read_copy(model, copy)
    manifest = replace(model.manifest, onnx=copy.file)
    session = InferenceSession(replace(model, manifest=manifest), threads=threads)
    check_golden(model, name, session.run)
    return session


GOLDEN_NAME = "golden.json"

Forward = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32]]]


def check_golden(model: StoredModel, name: str, run: Forward) -> float:
    """Run the golden vectors through copy `name`; the largest difference of a logit.

    Raises ModelContractError when it is over the copy's tolerance, or `golden.json` has no such copy.
    """
    try:
        golden = json.loads(model.path(GOLDEN_NAME).read_bytes())
        tolerance = float(golden["logit_tolerance"][name])
        vectors = [(image["prepared_png"], image["copies"][name]["logits"]) for image in golden["images"]]
        expected = np.array([logits for _, logits in vectors])
        pixels = np.stack([_decode(text) for text, _ in vectors])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelContractError(
            f"{GOLDEN_NAME} has no vectors for {name}: {type(error).__name__}."
        ) from error
    difference = float(np.abs(run(pixels)[0] - expected).max())
    # A comparison that is false for not-a-number, so that it is refused.
    if not difference <= tolerance:
        raise ModelContractError(
            f"The edge copy {name} of {model.manifest.model_id} answers otherwise on this processor than where it "
            f"was certified: a logit differs by {difference:.3f}, {tolerance} is allowed. Use another copy."
        )
    return difference


def _decode(text: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
