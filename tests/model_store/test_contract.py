"""What a model folder must keep to be loaded: each breach is refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from model_store.manifest import MANIFEST_NAME, read_manifest
from model_store.registry import ModelStore
from serve_app.domain.diagnosis import TRAINED
from serve_app.domain.errors import ModelContractError

NAN = float("nan")


def put(*path: str, to: object = None) -> Callable[[dict], None]:
    """Set a value; without one, remove what is there."""

    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content.pop(path[-1], None)
        if to is not None:
            content[path[-1]] = to

    return change


def swap_a_label(content: dict) -> None:
    first, second = content["output"]["label_space"][:2]
    content["output"]["label_map"][first] = content["output"]["label_map"][second]


def repeat_a_label(content: dict) -> None:
    content["output"]["label_space"].append(content["output"]["label_space"][0])


BREACHES = {
    "modality": (put("modality", to="clinical"), "modality"),
    "id": (put("tag", to="another"), "architecture.tag"),
    "no licence": (put("licence"), "licence"),
    "unknown key": (put("licence_url", to="x"), "licence_url"),
    "unknown inner key": (put("output", "classes", to=8), "classes"),
    "labels twice": (swap_a_label, "one to one"),
    "label repeated": (repeat_a_label, "each label once"),
    "label unknown": (put("output", "label_map", "XYZ", to="MEL"), "label_map"),
    "label UNK": (put("output", "label_map", to={"x": "UNK"}), "label_map"),
    "label nonsense": (put("output", "label_map", to={"x": "WART"}), r"label_map\.x"),
    "width": (put("output", "embedding_dim", to=256), "embedding_dim"),
    "temperature zero": (put("calibration", "temperature", to=0.0), "temperature"),
    "temperature nan": (put("calibration", "temperature", to=NAN), "temperature"),
    "temperature infinite": (put("calibration", "temperature", to=float("inf")), "temperature"),
    "temperature text": (put("calibration", "temperature", to="1.0"), "temperature"),
    "threshold missing": (put("conformal", "thresholds", TRAINED[0]), "thresholds"),
    "threshold nan": (put("conformal", "thresholds", TRAINED[0], to=NAN), "probabilities"),
    "coverage": (put("conformal", "coverage", to=95.0), "coverage"),
    "slope nan": (put("ood", "slope", to=NAN), "slope"),
    "operating point nan": (put("operating_points", "melanoma", "threshold", to=NAN), "operating points"),
    "operating points a list": (put("operating_points", to=[1]), "operating_points"),
    "no space": (put("spaces", to=[]), "embedding space"),
    "no digest": (put("files", "model.onnx"), "no digest"),
    "output a number": (put("output", to=1), "output"),
}


@pytest.mark.parametrize(("change", "named"), BREACHES.values(), ids=BREACHES)
def test_a_breach_of_the_contract_is_refused(altered, model_id: str, change, named: str) -> None:
    with pytest.raises(ModelContractError, match=named):
        ModelStore(altered(change)).open(model_id)


def test_every_breach_is_named_at_once(altered, model_id: str) -> None:
    def change(content: dict) -> None:
        content["modality"] = "clinical"
        content["calibration"]["temperature"] = 0.0

    with pytest.raises(ModelContractError, match=r"modality.*temperature"):
        ModelStore(altered(change)).open(model_id)


@pytest.mark.parametrize(
    ("text", "named"), [(None, "does not exist"), ("", "model_id"), ("not = [toml", "TOML"), ("\x00", "TOML")]
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str | None, named: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ModelContractError, match=named):
        read_manifest(tmp_path)
