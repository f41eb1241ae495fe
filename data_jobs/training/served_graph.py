"""Make a foreign ONNX model the graph that is served: `python -m data_jobs.training.served_graph`.

Names the ports as ours, picks the eight logits in the order of `TRAINED`, writes what they mean
into the file, and proves that nothing else changed. Needs the `onnx` package, no torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import onnx
from onnx import TensorProto, compose, helper, numpy_helper
import onnxruntime as ort

from model_store.manifest import EMBEDDING_DIM
from serve_app.domain.diagnosis import TRAINED

SAMPLED = 8
_SIDES = range(32, 1025)


def read_ports(model: onnx.ModelProto) -> tuple[str, int, str, str, int]:
    """Input name and side, logits name, bottleneck name, and how many logits there are.

    Raises ValueError for a graph that does not take uint8 N×S×S×3, or does not give logits
    and a bottleneck N×512 in one pass.
    """
    inputs = [
        port for port in model.graph.input if port.name not in {i.name for i in model.graph.initializer}
    ]
    found = [_described(port) for port in inputs]
    if len(found) != 1 or found[0][0] != TensorProto.UINT8 or len(found[0][1]) != 4:
        raise ValueError(
            f"The graph takes {[_text(port) for port in inputs]}; it must take one uint8 N×S×S×3: the pixels as "
            "they are, with mean and std inside the graph."
        )
    batch, height, width, channels = found[0][1]
    if batch is not None or height != width or height not in _SIDES or channels != 3:
        raise ValueError(
            f"The graph takes {_text(inputs[0])}; N must be free, S×S fixed and square, and 3 last."
        )
    outputs = {port.name: _described(port) for port in model.graph.output}
    wide = [
        name for name, (kind, shape) in outputs.items() if (kind, shape[1:]) == (TensorProto.FLOAT, [512])
    ]
    logits = [
        name
        for name, (kind, shape) in outputs.items()
        if name not in wide and kind == TensorProto.FLOAT and len(shape) == 2 and shape[1]
    ]
    if len(outputs) != 2 or len(wide) != 1 or len(logits) != 1:
        raise ValueError(
            f"The graph gives {[_text(port) for port in model.graph.output]}; it must give float logits N×C and a "
            f"float bottleneck N×{EMBEDDING_DIM}, the embedding. A timm checkpoint without one gets it at import."
        )
    return inputs[0].name, height, logits[0], wide[0], outputs[logits[0]][1][1]


def _described(port: onnx.ValueInfoProto) -> tuple[int, list[Any]]:
    tensor = port.type.tensor_type
    return tensor.elem_type, [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]


def _text(port: onnx.ValueInfoProto) -> str:
    kind, shape = _described(port)
    sizes = "×".join("N" if size is None else str(size) for size in shape)
    return f"{port.name}: {TensorProto.DataType.Name(kind).lower()} {sizes}"


def stated_labels(model: onnx.ModelProto) -> dict[str, str]:
    """What the file itself says of its labels: `label_space` (separated by commas) and `modality`, if it does."""
    return {p.key: p.value for p in model.metadata_props if p.key in {"label_space", "modality"}}


def state_labels(model: onnx.ModelProto) -> None:
    """Write into the file that its logits are the eight, in our order, of dermoscopic images."""
    kept = {p.key: p.value for p in model.metadata_props}
    helper.set_model_props(model, kept | {"label_space": ",".join(TRAINED), "modality": "dermoscopic"})


def adopt(model: onnx.ModelProto, positions: list[int]) -> onnx.ModelProto:
    """Put our ports around a graph: `positions` are those of the eight among its logits."""
    side = read_ports(model)[1]
    # Prefixed, so that no name of theirs is one of ours.
    inner = compose.add_prefix(model, "source/")
    source_input, _, source_logits, source_bottleneck, _ = read_ports(inner)
    graph = inner.graph
    picked = numpy_helper.from_array(np.array(positions, np.int64), "logit_positions")
    graph.initializer.append(picked)
    graph.node.insert(0, helper.make_node("Identity", ["pixels"], [source_input]))
    graph.node.append(helper.make_node("Gather", [source_logits, picked.name], ["logits"], axis=1))
    graph.node.append(helper.make_node("Identity", [source_bottleneck], ["bottleneck"]))
    del graph.input[:], graph.output[:]
    graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", side, side, 3]))
    for name, width in (("logits", len(TRAINED)), ("bottleneck", EMBEDDING_DIM)):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]))
    state_labels(inner)
    onnx.checker.check_model(inner)
    return inner


def prove_parity(
    source: bytes, adopted: bytes, positions: list[int], pixels: NDArray[np.uint8]
) -> dict[str, Any]:
    """Largest differences between the file as it came and the graph as it is served, on uint8 N×S×S×3.

    Raises ValueError when an answer depends on how many images a batch has, or is not finite.
    """
    name, _, logits_name, bottleneck_name, _ = read_ports(onnx.load_from_string(source))
    before, after = (ort.InferenceSession(b, providers=["CPUExecutionProvider"]) for b in (source, adopted))
    expected = before.run([logits_name, bottleneck_name], {name: pixels})
    found = after.run(["logits", "bottleneck"], {"pixels": pixels})
    alone = after.run(["logits"], {"pixels": pixels[:1]})[0]
    if not all(np.isfinite(array).all() for array in found):
        raise ValueError("The graph's answers are not finite.")
    if not np.allclose(alone, found[0][:1], atol=1e-3):
        raise ValueError("An image's logits depend on the other images of its batch.")
    return {
        "images": len(pixels),
        "max_abs_logit": float(np.abs(found[0] - expected[0][:, positions]).max()),
        "max_abs_bottleneck": float(np.abs(found[1] - expected[1]).max()),
    }


def load_whole(path: Path) -> tuple[bytes, onnx.ModelProto]:
    """Read a file that holds all of its weights. Raises ValueError when it is cut short, or refers to others."""
    content = path.read_bytes()
    try:
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and onnx's have no other common base
        raise ValueError(
            f"{path.name} is no whole ONNX model ({type(error).__name__}): cut short?"
        ) from error
    if any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        raise ValueError(f"{path.name} keeps weights in other files: export it as one.")
    try:
        ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's have no other common base
        raise ValueError(f"{path.name} does not load in ONNX Runtime: {error}") from error
    return content, model


def main() -> None:
    """`inspect`: print the ports and labels as JSON. `adopt`: write model.onnx and export.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("inspect", "adopt"))
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--positions", type=json.loads, help="of the eight among the logits, as a JSON list")
    parser.add_argument("--model-id")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    content, model = load_whole(arguments.source)
    name, side, _, _, width = read_ports(model)
    if arguments.action == "inspect":
        print(json.dumps({"input": name, "side": side, "labels": width, "stated": stated_labels(model)}))
        return
    adopted = adopt(model, arguments.positions).SerializeToString()
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLED, side, side, 3)).astype(np.uint8)
    parity = prove_parity(content, adopted, arguments.positions, pixels)
    (arguments.output / "model.onnx").write_bytes(adopted)
    report = {"model_id": arguments.model_id, "side": side, "source": "onnx", "parity": parity}
    report |= {"sides": [{"side": side}]}
    (arguments.output / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(parity))


if __name__ == "__main__":
    main()
