"""From the file that came to `model.onnx` and `export.json`, each kind of file in its own way."""

from __future__ import annotations

from dataclasses import dataclass
import json
from pathlib import Path

from data_jobs.promotion.file_kind import FileKind, read_safetensors_header, sniff_kind
from data_jobs.promotion.label_map import LabelMap, map_own_labels, read_label_map
from data_jobs.promotion.refusal import ImportRefused
from data_jobs.promotion.source import SourceFile
from data_jobs.promotion.training_step import run_step
from data_jobs.training.recipe import Recipe
from serve_app.domain.diagnosis import TRAINED

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
            "data_jobs.training.timm_checkpoint",
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
