"""Label spaces and modalities: what cannot be the eight diagnoses is refused, whatever a mapping says."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_jobs.promotion.candidate import ImportRefused
from data_jobs.promotion.export_source import map_own_labels, read_label_map
from serve_app.domain.diagnosis import TRAINED

MILK10K = ["AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC"]
SHARED = ("BCC", "BKL", "DF", "MEL", "NV", "VASC")
MILK10K_MAP = {
    **dict(zip(SHARED, SHARED, strict=True)),
    "AKIEC": "AK",
    "SCCKA": "SCC",
    "BEN_OTH": "ignored",
    "INF": "ignored",
    "MAL_OTH": "ignored",
}


def write_map(path: Path, labels: list[str], mapping: dict[str, str], modality: str = "dermoscopic") -> Path:
    lines = [f'modality = "{modality}"', f"label_space = {labels}", "[label_map]"]
    path.write_text(
        "\n".join([*lines, *(f'"{label}" = "{value}"' for label, value in mapping.items())]) + "\n"
    )
    return path


def test_the_eight_in_another_order_are_put_in_ours() -> None:
    labels = sorted(TRAINED)
    mapped = map_own_labels(labels, "dermoscopic")
    assert [labels[i] for i in mapped.positions] == list(TRAINED)
    assert mapped.ignored == ()


def test_eleven_labels_need_an_explicit_mapping(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"AKIEC.*--label-map"):
        map_own_labels(MILK10K, "dermoscopic")
    mapped = read_label_map(write_map(tmp_path / "map.toml", MILK10K, MILK10K_MAP))
    assert [MILK10K[i] for i in mapped.positions] == [
        "MEL",
        "NV",
        "BCC",
        "AKIEC",
        "BKL",
        "DF",
        "VASC",
        "SCCKA",
    ]
    assert mapped.ignored == ("BEN_OTH", "INF", "MAL_OTH")


def test_a_binary_model_is_refused_with_or_without_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="two labels"):
        map_own_labels(["benign", "malignant"], "dermoscopic")
    path = write_map(tmp_path / "map.toml", ["benign", "malignant"], {"benign": "NV", "malignant": "MEL"})
    with pytest.raises(ImportRefused, match="No mapping"):
        read_label_map(path)


def test_another_modality_is_refused(tmp_path: Path) -> None:
    labels = [d.value for d in TRAINED]
    path = write_map(
        tmp_path / "map.toml", labels, {label: label for label in labels}, modality="3D TBP tile"
    )
    with pytest.raises(ImportRefused, match="3D TBP tile"):
        read_label_map(path)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({**MILK10K_MAP, "MEL": "ignored"}, "no label is MEL"),
        ({**MILK10K_MAP, "MAL_OTH": "MEL"}, "several labels are MEL"),
        ({**MILK10K_MAP, "MAL_OTH": "UNK"}, "UNK is none of"),
        ({k: v for k, v in MILK10K_MAP.items() if k != "INF"}, "every label"),
    ],
)
def test_a_mapping_that_is_not_one_to_one_is_refused(tmp_path: Path, mapping, message: str) -> None:
    with pytest.raises(ImportRefused, match=message):
        read_label_map(write_map(tmp_path / "map.toml", MILK10K, mapping))


@pytest.mark.parametrize(
    "text", ["", "not = [toml", "modality = 1", "label_space = 1\nmodality = 'dermoscopic'"]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(ImportRefused):
        read_label_map(path)
