from __future__ import annotations

import pytest

from data_jobs.references.fetch.diagnoses import CLASSES, diagnosis_of
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis

MELANOMA = "Malignant:Malignant melanocytic proliferations (Melanoma)"
KERATOSIS = "Indeterminate:Indeterminate epidermal proliferations"
UNCERTAIN = "Indeterminate:Indeterminate melanocytic proliferations"
EPIDERMAL = "Malignant:Malignant epidermal proliferations"
VASCULAR = "Benign:Benign soft tissue proliferations - Vascular"


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    """Every diagnosis that the archive's own vocabulary knows."""
    known = pytest.importorskip(
        "isic_metadata.diagnosis_hierarchical", reason="isic-metadata, of the train extra, is not installed"
    )
    return [entry.value for entry in known.DiagnosisEnum]


@pytest.mark.parametrize(
    ("path", "diagnosis"),
    [
        (MELANOMA, "MEL"),
        (f"{MELANOMA}:Melanoma in situ:Melanoma in situ, Lentigo maligna type", "MEL"),
        (f"{MELANOMA}:Melanoma metastasis", None),
        ("Benign:Benign melanocytic proliferations:Nevus:Blue nevus:Blue nevus, Cellular", "NV"),
        ("Benign:Benign melanocytic proliferations", None),
        ("Benign:Benign melanocytic proliferations:Lentigo simplex", None),
        (f"{UNCERTAIN}:Atypical Spitz tumor", None),
        (f"{UNCERTAIN}:Atypical intraepithelial melanocytic proliferation", None),
        (f"{KERATOSIS}:Solar or actinic keratosis:Actinic keratosis, Bowenoid", "AK"),
        (f"{KERATOSIS}:Solar or actinic cheilitis", None),
        (
            f"{EPIDERMAL}:Squamous cell carcinoma in situ:Squamous cell carcinoma in situ, Bowens disease",
            "SCC",
        ),
        (f"{EPIDERMAL}:Keratoacanthoma", None),
        ("Malignant:Malignant adnexal epithelial proliferations - Follicular:Baso-squamous carcinoma", None),
        (VASCULAR, "VASC"),
        (f"{VASCULAR}:Hemangioma:Hemangioma, Cherry", "VASC"),
        (f"{VASCULAR}:Glomus tumor", None),
        ("Malignant:Malignant soft tissue proliferations - Vascular:Kaposi sarcoma", None),
        ("Benign:Benign epidermal proliferations:Solar lentigo", "BKL"),
        ("Benign:Benign epidermal proliferations:Epidermal nevus", None),
        ("Benign:Flat melanotic pigmentations - not melanocytic nevus:Ink-spot lentigo", None),
        ("Indeterminate", None),
        ("Nonsense:From:Elsewhere", None),
        ("", None),
    ],
)
def test_a_diagnosis_has_its_class_or_none(path, diagnosis):
    assert diagnosis_of(path.split(":")) == diagnosis


def test_a_level_below_a_missing_one_does_not_count():
    assert diagnosis_of(["Benign", None, "Nevus"]) is None
    assert diagnosis_of([*MELANOMA.split(":"), None, "Melanoma metastasis"]) is Diagnosis.MEL
    assert diagnosis_of([]) is None


def test_every_entry_of_the_table_is_a_diagnosis_of_the_archive(vocabulary):
    assert set(CLASSES) <= set(vocabulary)


#: How many of the archive's 418 diagnoses are in each class: a change of either list shows here.
COUNTS = {"MEL": 28, "NV": 32, "BCC": 10, "AK": 6, "BKL": 5, "DF": 6, "VASC": 29, "SCC": 35}


def test_every_diagnosis_of_the_archive_is_judged(vocabulary):
    classes = [diagnosis_of(value.split(":")) for value in vocabulary]
    found = {diagnosis.value: classes.count(diagnosis) for diagnosis in TRAINED}
    assert found == COUNTS


def test_no_benign_diagnosis_becomes_malignant_and_no_malignant_one_benign(vocabulary):
    for value in vocabulary:
        found = diagnosis_of(value.split(":"))
        if found is not None and found is not Diagnosis.AK:
            assert value.startswith("Malignant") == (found in MALIGNANT), value
        assert value.startswith("Indeterminate") or found is not Diagnosis.AK


@pytest.mark.parametrize(
    ("diagnosis", "words"),
    [
        ("MEL", ("Melanoma",)),
        ("NV", ("Nevus", "nevus")),
        ("BCC", ("Basal cell carcinoma",)),
        ("AK", ("actinic keratosis", "Actinic keratosis")),
        ("BKL", ("keratosis", "Solar lentigo")),
        ("DF", ("Dermatofibroma",)),
        ("SCC", ("Squamous cell carcinoma",)),
    ],
)
def test_what_is_in_a_class_says_so_in_its_name(vocabulary, diagnosis, words):
    names = [value.split(":")[-1] for value in vocabulary if diagnosis_of(value.split(":")) == diagnosis]
    assert names
    assert [name for name in names if not any(word.lower() in name.lower() for word in words)] == []
