"""ONNX Runtime sessions over stored models. The serving path imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
import onnxruntime as ort

from model_store.manifest import Manifest
from model_store.registry import StoredModel
from serve_app.domain.diagnosis import TRAINED
from serve_app.domain.errors import ModelContractError

Device = Literal["cpu", "cuda"]

#: ONNX Runtime's execution provider for a device, with the options that make its answers repeatable: by default it
#: computes with TF32's 10 bits of mantissa where a GPU can, and times cuDNN's algorithms anew in every process.
PROVIDERS: Mapping[Device, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}),
}


class Outputs(NamedTuple):
    """What one forward pass gives for N images, float32; logits in the order of `TRAINED`.

    logits N×8 and bottleneck N×512; members N×M×8 are an ensemble's own logits (None: one network's are the logits),
    unknown N the graph's own out-of-distribution score where it has one.
    """

    logits: NDArray[np.float32]
    bottleneck: NDArray[np.float32]
    members: NDArray[np.float32] | None = None
    unknown: NDArray[np.float32] | None = None

    def part(self, picked: slice | NDArray[np.bool_] | NDArray[np.intp]) -> Outputs:
        """Of the images that are picked."""
        return Outputs(*(None if array is None else array[picked] for array in self))  # type: ignore[arg-type]

    @property
    def finite(self) -> bool:
        """Whether all of it is."""
        return all(array is None or bool(np.isfinite(array).all()) for array in self)


def open_session(graph: bytes, name: str, threads: int, device: Device = "cpu") -> ort.InferenceSession:
    """ONNX Runtime over a graph, whose file has this name. Raises ModelContractError when it is none."""
    provider, _ = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise ModelContractError(
            f"{provider} is not available; install the {'gpu' if device == 'cuda' else 'cpu'} extra."
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads would take the cores that the other stages need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(graph, options, providers=[PROVIDERS[device]])
    except Exception as error:  # ONNX Runtime's have no other common base
        raise ModelContractError(f"{name} is no model: {type(error).__name__}.") from error
    if provider not in session.get_providers():
        raise ModelContractError(f"ONNX Runtime fell back from {provider}.")
    return session


class InferenceSession:
    """One forward pass over pixels uint8 N×H×W×3.

    Safe to call from several threads at once; each call uses `threads` cores.
    """

    def __init__(self, model: StoredModel, *, threads: int, device: Device = "cpu") -> None:
        manifest = model.manifest
        self._session = open_session(model.path(manifest.onnx).read_bytes(), manifest.onnx, threads, device)
        _check_graph(self._session, manifest)
        output = manifest.output
        self._input = manifest.input.name
        self._optional = output.member_logits, output.unknown
        self._outputs = [output.logits, output.bottleneck, *filter(None, self._optional)]
        by_diagnosis = {output.label_map[label]: index for index, label in enumerate(output.label_space)}
        self._order = np.array([by_diagnosis[diagnosis] for diagnosis in TRAINED], dtype=np.intp)

    def run(self, pixels: NDArray[np.uint8]) -> Outputs:
        """Run N images in one pass."""
        arrays = self._session.run(self._outputs, {self._input: pixels})
        found = dict(zip(self._outputs, arrays, strict=True))
        members, unknown = (None if name is None else found[name] for name in self._optional)
        logits, bottleneck = arrays[:2]
        return Outputs(
            logits[:, self._order],
            bottleneck,
            None if members is None else members[..., self._order],
            unknown,
        )


def _check_graph(session: ort.InferenceSession, manifest: Manifest) -> None:
    """Raise ModelContractError unless the graph has the inputs, outputs and labels that its manifest says.

    Models from before the export wrote their labels down name none.
    """
    channels, height, width = manifest.input.input_size
    expected = {
        manifest.input.name: ("tensor(uint8)", [height, width, channels]),
        manifest.output.logits: ("tensor(float)", [len(manifest.output.label_space)]),
        manifest.output.bottleneck: ("tensor(float)", [manifest.output.embedding_dim]),
    }
    if manifest.output.member_logits is not None:
        expected[manifest.output.member_logits] = (
            "tensor(float)",
            [manifest.output.members, len(manifest.output.label_space)],
        )
    if manifest.output.unknown is not None:
        expected[manifest.output.unknown] = ("tensor(float)", [])
    ports = [*session.get_inputs(), *session.get_outputs()]
    found = {port.name: (port.type, list(port.shape[1:])) for port in ports}
    if found != expected:
        raise ModelContractError(f"{manifest.onnx} has {found}, its manifest says {expected}.")
    stated = session.get_modelmeta().custom_metadata_map.get("label_space")
    if stated is not None and tuple(stated.split(",")) != manifest.output.label_space:
        raise ModelContractError(
            f"{manifest.onnx} gives its logits as {stated}, its manifest as {','.join(manifest.output.label_space)}."
        )
