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


def put(*path: str, to: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def drop(*path: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def swap_a_label(content: dict) -> None:
    label = content["output"]["label_space"][0]
    other = content["output"]["label_space"][1]
    content["output"]["label_map"][label] = content["output"]["label_map"][other]


def repeat_a_label(content: dict) -> None:
    content["output"]["label_space"].append(content["output"]["label_space"][0])


def break_a_point(content: dict) -> None:
    name = next(iter(content["operating_points"]))
    content["operating_points"][name]["threshold"] = NAN


BREACHES = {
    "modality": (put("modality", to="clinical"), "modality"),
    "id": (put("tag", to="another"), "architecture.tag"),
    "no licence": (drop("licence"), "licence"),
    "unknown key": (put("licence_url", to="x"), "licence_url"),
    "unknown output key": (put("output", "classes", to=8), "classes"),
    "unknown input key": (put("input", "colour", to="RGB"), "colour"),
    "unknown calibration key": (put("calibration", "bias", to=0.1), "bias"),
    "unknown conformal key": (put("conformal", "alpha", to=0.1), "alpha"),
    "labels twice": (swap_a_label, "one to one"),
    "label repeated": (repeat_a_label, "each label once"),
    "label unknown": (put("output", "label_map", "XYZ", to="MEL"), "label_map"),
    "label UNK": (put("output", "label_map", to={"x": "UNK"}), "label_map"),
    "label nonsense": (put("output", "label_map", to={"x": "WART"}), r"label_map\.x"),
    "width": (put("output", "embedding_dim", to=256), "embedding_dim"),
    "temperature zero": (put("calibration", "temperature", to=0.0), "temperature"),
    "temperature negative": (put("calibration", "temperature", to=-1.0), "temperature"),
    "temperature nan": (put("calibration", "temperature", to=NAN), "temperature"),
    "temperature infinite": (put("calibration", "temperature", to=float("inf")), "temperature"),
    "temperature text": (put("calibration", "temperature", to="1.0"), "temperature"),
    "threshold missing": (drop("conformal", "thresholds", TRAINED[0]), "thresholds"),
    "threshold nan": (put("conformal", "thresholds", TRAINED[0], to=NAN), "probabilities"),
    "coverage": (put("conformal", "coverage", to=95.0), "coverage"),
    "slope nan": (put("ood", "slope", to=NAN), "slope"),
    "operating point nan": (break_a_point, "operating points"),
    "operating points a list": (put("operating_points", to=[1]), "operating_points"),
    "no space": (put("spaces", to=[]), "embedding space"),
    "no digest": (drop("files", "model.onnx"), "no digest"),
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


@pytest.mark.parametrize("text", ["", "not = [toml", "\x00"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ModelContractError):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelContractError, match="does not exist"):
        read_manifest(tmp_path)
