"""What a model file is, by its content: its name may say anything."""

from __future__ import annotations

import json
from pathlib import Path
import struct
from typing import Any, Literal

from data_jobs.promotion.refusal import ImportRefused

FileKind = Literal["onnx", "safetensors", "checkpoint"]

#: As in the reference implementation of safetensors.
_MAX_HEADER = 100_000_000


def sniff_kind(path: Path) -> FileKind:
    """Tell safetensors, a torch archive and ONNX apart; ImportRefused for a pickle or anything else.

    A torch archive holds a pickle: it is read, with `weights_only`, only when it is our own.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04":
        return "checkpoint"
    if head[:1] == b"\x80":
        raise ImportRefused(
            f"{path.name} is a pickle: it would run whatever its author wrote. Have it as safetensors."
        )
    if head[8:9] == b"{":
        read_safetensors_header(path)
        return "safetensors"
    # ONNX is a ModelProto, which begins with ir_version: field 1, a varint.
    if head[:1] == b"\x08":
        return "onnx"
    raise ImportRefused(f"{path.name} is neither ONNX nor safetensors.")


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Read the names, types and shapes of the tensors, and `__metadata__`; ImportRefused when it is broken."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_MAX_HEADER, size - 8):
            raise ImportRefused(
                f"{path.name} is no whole safetensors file: its header is longer than the file."
            )
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ImportRefused(f"{path.name} has a broken safetensors header.") from error
    if 8 + length + max(ends, default=0) != size:
        raise ImportRefused(f"{path.name} is cut short, or longer than its header says.")
    found: dict[str, Any] = header
    return found
