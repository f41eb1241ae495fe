"""Label spaces: what a model's logits mean, and which of them the eight diagnoses are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
import tomllib

from data_jobs.promotion.refusal import ImportRefused
from serve_app.domain.diagnosis import TRAINED, Diagnosis

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
