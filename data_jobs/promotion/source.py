"""The file that a model comes in: taken whole, with its digest, before it is parsed; what it is; its labels; its export."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
import hashlib
import json
import os
from pathlib import Path
import re
import struct
import subprocess
import sys
import tomllib
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from data_jobs.downloads import Bounds, NotTaken
from data_jobs.promotion.candidate import ImportRefused
from data_jobs.training.recipe import Recipe
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import DermError

FileKind = Literal["onnx", "safetensors", "checkpoint"]

#: The largest network of timm's EfficientNet family is a quarter of this.
MAX_BYTES = 1 << 30
_HUB = "hf-hub:"
#: Where the hub keeps what it serves.
_HUB_HOSTS = ("huggingface.co", "hf.co")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?")
_TIMEOUT_S = 30
_BLOCK = 1 << 20
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import, and what its file cannot say of itself.

    `source`: a path, an https URL or `hf-hub:ORG/NAME`. `licence` and `training_data` go into
    the manifest and the card; our own checkpoint needs neither.
    """

    source: str
    recipe: Path
    sha256: str | None = None
    label_map: Path | None = None
    licence: str | None = None
    training_data: str | None = None
    side: int | None = None
    threads: int = 1
    allow_host: Sequence[str] = ()


def take_source(
    source: str, sha256: str | None, folder: Path, *, max_bytes: int = MAX_BYTES, hosts: Sequence[str] = ()
) -> tuple[Path, str]:
    """Copy a local file, or download an https URL or `hf-hub:ORG/NAME[@REVISION]`, into `folder`: the copy, its SHA-256.

    What comes over a network must have its SHA-256 stated beforehand, and may be led to `hosts` (see Bounds). Raises ImportRefused for a
    digest that is missing or another, a file that is too large, or one that cannot be had; what is in
    the folder is then not to be used.
    """
    remote, stated = source.startswith(_HUB) or "://" in source, sha256 and sha256.lower()
    if stated is not None and not re.fullmatch(r"[0-9a-f]{64}", stated):
        raise ImportRefused("--sha256 takes 64 hex digits.")
    if remote and stated is None:
        raise ImportRefused(f"{source} comes over the network: state its SHA-256 with --sha256.")
    digest, size, path = hashlib.sha256(), 0, folder / "source"
    with (
        closing(_download(source, max_bytes, hosts) if remote else _read(Path(source))) as blocks,
        path.open("wb") as file,
    ):
        for block in blocks:
            size += len(block)
            if size > max_bytes:
                raise ImportRefused(f"{source} is larger than {max_bytes} bytes.")
            digest.update(block)
            file.write(block)
    if stated not in {None, digest.hexdigest()}:
        raise ImportRefused(f"{source} has SHA-256 {digest.hexdigest()}, not {stated}: it is not that file.")
    return path, digest.hexdigest()


def _read(path: Path) -> Generator[bytes]:
    with path.open("rb") as file:
        yield from iter(lambda: file.read(_BLOCK), b"")


def _download(source: str, max_bytes: int, hosts: Sequence[str]) -> Generator[bytes]:
    on_hub = source.startswith(_HUB)
    url = _hub_url(source) if on_hub else source
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ImportRefused(f"{url}: only https is taken.")
    bounds = Bounds(url, [*(_HUB_HOSTS if on_hub else ()), *hosts])
    size: int | None = None
    try:
        with (
            httpx.Client(timeout=_TIMEOUT_S, headers={"User-Agent": "derm-cds"}) as client,
            bounds.open(client, url) as response,
        ):
            response.raise_for_status()
            size = 0
            for block in bounds.read(response, max_bytes):
                size += len(block)
                yield block
    except NotTaken as error:
        raise ImportRefused(str(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        if size is not None:
            raise ImportRefused(f"{source} broke off after {size} bytes: {error}.") from error
        raise ImportRefused(
            f"{url} cannot be had: {error}. On a machine without a network, bring the file over and give its path."
        ) from error


def _hub_url(source: str) -> str:
    match = _HUB_NAME.fullmatch(source.removeprefix(_HUB))
    if match is None:
        raise ImportRefused(f"{source} is not {_HUB}ORGANISATION/NAME or {_HUB}ORGANISATION/NAME@REVISION.")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    # Of a repository's files only this one: the others may be pickles.
    return f"{hub}/{match['name']}/resolve/{match['revision'] or 'main'}/model.safetensors"


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


#: What the lock `train` brings and serving does without.
_EXTRA = ("torch", "timm", "onnx", "safetensors", "skimage", "sklearn", "matplotlib")


def run_step(module: str, *arguments: object) -> str:
    """Run `python -m MODULE ARGUMENTS` and return what it printed.

    Raises ImportRefused with the last thing it said when it fails, DermError when what the lock
    `train` names is not installed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip().splitlines()
    last = said[-1] if said else f"exit code {done.returncode}"
    if any(f"No module named '{name}" in last for name in _EXTRA):
        raise DermError(
            f"{module} needs the lock `train` ({last}): stop the service, then "
            "`DERM_LOCKS=jobs,test,train scripts/serve`."
        )
    raise ImportRefused(f"{module.rpartition('.')[2]}: {last.removeprefix('ValueError: ')}")


#: In a label map: this label is none of the eight, and its logit is left out.
IGNORED = "ignored"
_MODALITY = "dermoscopic"


@dataclass(frozen=True, slots=True)
class LabelMap:
    """`label_space`: the model's own labels in the order of its logits. `positions`: where the eight are in it."""

    label_space: tuple[str, ...]
    positions: tuple[int, ...]

    @property
    def ignored(self) -> tuple[str, ...]:
        """Labels whose logits are left out."""
        return tuple(label for i, label in enumerate(self.label_space) if i not in self.positions)


def map_own_labels(label_space: Sequence[str], modality: str) -> LabelMap:
    """Map labels that are the eight by name already, in whatever order."""
    return _checked(modality, label_space, {label: label for label in label_space}, "the model")


def read_label_map(path: Path) -> LabelMap:
    """Read a mapping: `modality`, `label_space` in the order of the logits, `[label_map]` label = diagnosis.

    Raises ImportRefused unless it is dermoscopic, names every label once, and each of the eight once.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        if unknown := set(raw) - {"modality", "label_space", "label_map"}:
            raise ImportRefused(f"{path}: unknown {', '.join(sorted(unknown))}.")
        return _checked(raw["modality"], raw["label_space"], raw["label_map"], str(path))
    except KeyError as error:
        raise ImportRefused(f"{path}: {error} is missing.") from error
    except (tomllib.TOMLDecodeError, TypeError, AttributeError) as error:
        raise ImportRefused(f"{path}: {error}.") from error


def _checked(modality: str, label_space: Sequence[str], label_map: dict[str, str], source: str) -> LabelMap:
    if modality != _MODALITY:
        raise ImportRefused(
            f"{source}: the model is for {modality} images, and this service for {_MODALITY} ones. "
            "No mapping of labels can mend that."
        )
    labels = list(label_space)
    if len(labels) == 2:
        raise ImportRefused(
            f"{source}: a model of two labels ({', '.join(labels)}), as ISIC 2024's are, cannot tell the eight "
            "diagnoses apart. No mapping of labels can mend that."
        )
    if len(set(labels)) != len(labels) or set(label_map) != set(labels):
        raise ImportRefused(f"{source}: label_map must have every label of label_space, each once.")
    known = {d.value for d in TRAINED}
    if wrong := sorted({value for value in label_map.values() if value not in known | {IGNORED}}):
        raise ImportRefused(
            f"{source}: {', '.join(wrong)} is none of {', '.join(TRAINED)}. Say with --label-map which label is "
            f'which diagnosis; one that is none of them is "{IGNORED}".'
        )
    by_diagnosis = {d: [i for i, label in enumerate(labels) if label_map[label] == d] for d in TRAINED}
    if missing := [d for d, found in by_diagnosis.items() if not found]:
        raise ImportRefused(f"{source}: no label is {', '.join(missing)}; all eight must be there.")
    if twice := [d for d, found in by_diagnosis.items() if len(found) > 1]:
        raise ImportRefused(f"{source}: several labels are {', '.join(twice)}; the map must be one to one.")
    return LabelMap(tuple(labels), tuple(by_diagnosis[Diagnosis(d)][0] for d in TRAINED))


#: The largest difference of a logit between the weights as they came and the graph that is served.
MAX_LOGIT_DIFFERENCE = 1e-3


@dataclass(frozen=True, slots=True)
class ExportedSource:
    """What kind of file it was, its labels, and one line that tells how far the graph answers as the source does."""

    kind: FileKind
    labels: LabelMap
    parity: str


def export_source(source: Path, recipe: Recipe, request: ImportRequest, output: Path) -> ExportedSource:
    """Check the file against the contract and export it into `output`.

    Raises ImportRefused when it is no such file, its labels or ports do not keep the contract, or the
    exported graph answers otherwise than the source.
    """
    kind = sniff_kind(source)
    if kind == "checkpoint":
        if request.sha256 is None:
            raise ImportRefused(
                "A torch checkpoint is read only when it is our own: state the SHA-256 of the one that "
                "training wrote, with --sha256. Weights from elsewhere must come as safetensors."
            )
        labels = map_own_labels(TRAINED, _MODALITY)
        run_step(
            "data_jobs.training.export",
            *("--recipe", request.recipe, "--checkpoint", source, "--output", output),
        )
    elif kind == "safetensors":
        labels = _safetensors_labels(source, request.label_map)
        run_step(
            "data_jobs.training.export",
            *("--recipe", request.recipe, "--weights", source, "--positions", list(labels.positions)),
            *("--side", request.side or max(recipe.serving_sides), "--output", output),
        )
    else:
        labels = _onnx_labels(source, request.label_map)
        run_step(
            "data_jobs.training.served_graph",
            *("adopt", "--source", source, "--positions", list(labels.positions)),
            *("--model-id", recipe.model_id, "--output", output),
        )
    exported = json.loads((output / "export.json").read_text(encoding="utf-8"))
    parity = exported["parity"]
    worst = max(parity["max_abs_logit"], exported.get("max_abs_logit_of_timm", 0.0))
    if not worst <= MAX_LOGIT_DIFFERENCE:
        raise ImportRefused(
            f"The exported graph does not answer as its source does: max |Δlogit| {worst:.1e} "
            f"(limit {MAX_LOGIT_DIFFERENCE:.0e})."
        )
    told = f"side {exported['side']}, max |Δlogit| {worst:.1e} over {parity['images']} images"
    return ExportedSource(kind, labels, told)


def _safetensors_labels(path: Path, label_map: Path | None) -> LabelMap:
    header = read_safetensors_header(path)
    if "classifier.weight" not in header:
        # Our own network's tensors: their labels are ours by construction, and their names are checked on loading.
        if "classify.weight" not in header:
            raise ImportRefused(
                f"{path.name} has neither timm's `classifier.weight` nor our `classify.weight`: a trunk without its "
                "classifier has no label space."
            )
        return map_own_labels(TRAINED, _MODALITY)
    metadata = header.get("__metadata__") or {}
    return _labels(header["classifier.weight"]["shape"][0], metadata, label_map)


def _onnx_labels(path: Path, label_map: Path | None) -> LabelMap:
    found = json.loads(run_step("data_jobs.training.served_graph", "inspect", "--source", path))
    return _labels(found["labels"], found["stated"], label_map)


def _labels(count: int, stated: dict[str, str], label_map: Path | None) -> LabelMap:
    """Labels as a mapping or the file itself states them; refused when nobody does, or the count is another."""
    if label_map is not None:
        labels = read_label_map(label_map)
    elif stated.get("label_space"):
        labels = map_own_labels(stated["label_space"].split(","), stated.get("modality", "unstated"))
    elif count == 2:
        labels = map_own_labels(["label 0", "label 1"], _MODALITY)
    else:
        raise ImportRefused(
            f"The model has {count} labels and does not say what they are: the contract is {len(TRAINED)}, one for "
            f"each of {', '.join(TRAINED)}. Say which is which with --label-map."
        )
    if len(labels.label_space) != count:
        raise ImportRefused(f"The model has {count} logits, and {len(labels.label_space)} labels are stated.")
    return labels
