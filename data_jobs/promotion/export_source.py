"""From the file that came to `model.onnx` and `export.json`, each kind of file in its own way, and what its labels mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import json
from pathlib import Path
import subprocess
import sys
import tomllib

from data_jobs.promotion.candidate import ImportRefused
from data_jobs.promotion.source import FileKind, SourceFile, read_safetensors_header, sniff_kind
from data_jobs.training.recipe import Recipe
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import DermError

#: What the `train` extra brings and serving does without.
_EXTRA = ("torch", "timm", "onnx", "safetensors", "skimage", "sklearn", "matplotlib")


def run_step(module: str, *arguments: object) -> str:
    """Run `python -m MODULE ARGUMENTS` and return what it printed.

    Raises ImportRefused with the last thing it said when it fails, DermError when the `train`
    extra is not installed.
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
            f"{module} needs the `train` extra ({last}): pip install 'pms-derm-cds[train,cpu]' into this environment."
        )
    raise ImportRefused(f"{module.rpartition('.')[2]}: {last.removeprefix('ValueError: ')}")


#: In a label map: this label is none of the eight, and its logit is left out.
IGNORED = "ignored"
_MODALITY = "dermoscopic"


@dataclass(frozen=True, slots=True)
class LabelMap:
    """`label_space`: the model's own labels in the order of its logits. `positions`: where the eight are in it."""

    modality: str
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
    return LabelMap(modality, tuple(labels), tuple(by_diagnosis[Diagnosis(d)][0] for d in TRAINED))


#: The largest difference of a logit between the weights as they came and the graph that is served.
MAX_LOGIT_DIFFERENCE = 1e-3


@dataclass(frozen=True, slots=True)
class ExportedSource:
    """What kind of file it was, its labels, and one line that tells of parity."""

    kind: FileKind
    labels: LabelMap
    told: str


def export_source(
    source: SourceFile,
    recipe: Recipe,
    *,
    recipe_path: Path,
    digest_stated: bool,
    label_map: Path | None,
    side: int | None,
    output: Path,
) -> ExportedSource:
    """Check the file against the contract and export it into `output`.

    Raises ImportRefused when it is no such file, its labels or ports do not keep the contract, or the
    exported graph answers otherwise than the source.
    """
    kind = sniff_kind(source.path)
    if kind == "checkpoint":
        if not digest_stated:
            raise ImportRefused(
                "A torch checkpoint is read only when it is our own: state the SHA-256 of the one that "
                "training wrote, with --sha256. Weights from elsewhere must come as safetensors."
            )
        labels = _ours()
        run_step(
            "data_jobs.training.export",
            *("--recipe", recipe_path, "--checkpoint", source.path, "--output", output),
        )
    elif kind == "safetensors":
        labels = _safetensors_labels(source.path, label_map)
        run_step(
            "data_jobs.training.export",
            *("--recipe", recipe_path, "--weights", source.path, "--positions", list(labels.positions)),
            *("--side", side or max(recipe.serving_sides), "--output", output),
        )
    else:
        labels = _onnx_labels(source.path, label_map)
        run_step(
            "data_jobs.training.served_graph",
            *("adopt", "--source", source.path, "--positions", list(labels.positions)),
            *("--model-id", recipe.model_id, "--output", output),
        )
    return ExportedSource(kind, labels, _prove_parity(output))


def _prove_parity(output: Path) -> str:
    exported = json.loads((output / "export.json").read_text(encoding="utf-8"))
    parity = exported["parity"]
    worst = max(parity["max_abs_logit"], exported.get("max_abs_logit_of_timm", 0.0))
    if not worst <= MAX_LOGIT_DIFFERENCE:
        raise ImportRefused(
            f"The exported graph does not answer as its source does: max |Δlogit| {worst:.1e} "
            f"(limit {MAX_LOGIT_DIFFERENCE:.0e})."
        )
    return f"side {exported['side']}, max |Δlogit| {worst:.1e} over {parity['images']} images"


def _ours() -> LabelMap:
    return map_own_labels([d.value for d in TRAINED], "dermoscopic")


def _safetensors_labels(path: Path, label_map: Path | None) -> LabelMap:
    header = read_safetensors_header(path)
    if "classifier.weight" not in header:
        # Our own network's tensors: their labels are ours by construction, and their names are checked on loading.
        if "classify.weight" not in header:
            raise ImportRefused(
                f"{path.name} has neither timm's `classifier.weight` nor our `classify.weight`: a trunk without its "
                "classifier has no label space."
            )
        return _ours()
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
        labels = map_own_labels(["label 0", "label 1"], "dermoscopic")
    else:
        raise ImportRefused(
            f"The model has {count} labels and does not say what they are: the contract is {len(TRAINED)}, one for "
            f"each of {', '.join(TRAINED)}. Say which is which with --label-map."
        )
    if len(labels.label_space) != count:
        raise ImportRefused(f"The model has {count} logits, and {len(labels.label_space)} labels are stated.")
    return labels
