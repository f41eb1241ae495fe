from __future__ import annotations

import pytest

from data_jobs.references.catalogue import CatalogueEntry, Licence, licence_of, parse_licences
from data_jobs.references.fetch.eligibility import CLASSES, SITES, Eligibility, LeftOut, diagnosis_of, site_of
from data_jobs.references.fetch.sources import flatten
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import InvalidField

MELANOMA = "Malignant:Malignant melanocytic proliferations (Melanoma)"
KERATOSIS = "Indeterminate:Indeterminate epidermal proliferations"
EPIDERMAL = "Malignant:Malignant epidermal proliferations"
VASCULAR = "Benign:Benign soft tissue proliferations - Vascular"


@pytest.mark.parametrize(
    ("path", "diagnosis"),
    [
        (f"{MELANOMA}:Melanoma in situ:Melanoma in situ, Lentigo maligna type", "MEL"),
        (f"{MELANOMA}:Melanoma metastasis", None),
        ("Benign:Benign melanocytic proliferations", None),
        (f"{KERATOSIS}:Solar or actinic keratosis:Actinic keratosis, Bowenoid", "AK"),
        (f"{EPIDERMAL}:Keratoacanthoma", None),
        (f"{VASCULAR}:Hemangioma:Hemangioma, Cherry", "VASC"),
        (f"{VASCULAR}:Glomus tumor", None),
        ("Malignant:Malignant soft tissue proliferations - Vascular:Kaposi sarcoma", None),
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


#: How many of the archive's 418 diagnoses are in each class: a change of either list shows here.
COUNTS = {"MEL": 28, "NV": 32, "BCC": 10, "AK": 6, "BKL": 5, "DF": 6, "VASC": 29, "SCC": 35}


def test_every_diagnosis_of_the_archive_is_judged_and_none_of_benign_and_malignant_taken_for_the_other():
    known = pytest.importorskip(
        "isic_metadata.diagnosis_hierarchical", reason="isic-metadata, of the train extra, is not installed"
    )
    classes = {entry.value: diagnosis_of(entry.value.split(":")) for entry in known.DiagnosisEnum}
    assert {diagnosis.value: list(classes.values()).count(diagnosis) for diagnosis in TRAINED} == COUNTS
    assert set(CLASSES) <= set(classes)
    for value, found in classes.items():
        if found is not None and found is not Diagnosis.AK:
            assert value.startswith("Malignant") == (found in MALIGNANT), value
        assert value.startswith("Indeterminate") or found is not Diagnosis.AK


@pytest.fixture
def judge(new_image):
    def judge(eligibility: Eligibility | None = None, diagnosis="NV", number=3, **changes):
        record = flatten(new_image(number, diagnosis)) | changes
        return (eligibility or Eligibility()).judge(record, source="archive")

    return judge


def test_an_image_becomes_an_entry_in_the_archives_words(judge):
    entry = judge(patient_id="IP_0000012", fitzpatrick_skin_type="IV", mel_thick_mm=0.3)
    assert entry == CatalogueEntry(
        isic_id="ISIC_0000003",
        lesion_id="IL_0000003",
        patient_id="IP_0000012",
        diagnosis=Diagnosis.NV,
        diagnosis_confirm_type="histo",
        age_approx=40,
        sex="male",
        anatom_site_general="head/neck",
        fitzpatrick_skin_type="IV",
        image_type="dermoscopic",
        copyright_license="CC-0",
        attribution="Hospital Clinic de Barcelona",
        source="archive",
        path="images/ISIC_0000003.jpg",
    )


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"isic_id": "../../etc/passwd"}, LeftOut.BAD_ID),
        ({"public": False}, LeftOut.NOT_PUBLIC),
        ({"image_type": "clinical: close-up"}, LeftOut.NOT_DERMOSCOPIC),
        ({"image_type": None}, LeftOut.NOT_DERMOSCOPIC),
        ({"copyright_license": "CC-BY-ND"}, LeftOut.LICENCE),
        ({"copyright_license": ""}, LeftOut.LICENCE),
        ({"attribution": "  "}, LeftOut.NO_ATTRIBUTION),
        ({"diagnosis_1": None}, LeftOut.NO_DIAGNOSIS),
        ({"diagnosis_1": "Indeterminate"}, LeftOut.INDETERMINATE),
        ({"diagnosis_2": "Cysts"}, LeftOut.OTHER_DIAGNOSIS),
        ({"diagnosis_confirm_type": None}, LeftOut.UNCONFIRMED),
        ({"diagnosis_confirm_type": "single contributor clinical assessment"}, LeftOut.UNCONFIRMED),
        ({"pixels_x": 9000, "pixels_y": 9000}, LeftOut.TOO_LARGE),
        ({"pixels_x": 20}, LeftOut.TOO_SMALL),
        ({"image_manipulation": "synthetic"}, LeftOut.NOT_A_PHOTOGRAPH),
        ({"bytes": 21 * 1024 * 1024}, LeftOut.TOO_LARGE),
    ],
)
def test_what_is_no_candidate_is_left_out_by_cause(judge, changes, cause):
    assert judge(**changes) is cause


@pytest.mark.parametrize("name", ["ISIC_0000003", "IL_0000003", "IP_0000012"])
def test_an_image_its_lesion_or_its_patient_can_be_excluded(judge, name):
    eligibility = Eligibility(excluded=frozenset({name}))
    assert judge(eligibility, patient_id="IP_0000012") is LeftOut.EXCLUDED
    assert judge(eligibility, number=4).isic_id == "ISIC_0000004"


def test_only_the_licences_asked_for_pass_and_an_age_that_is_none_is_not_known(judge):
    free = Eligibility(licences=parse_licences("cc-0,cc-by"))
    assert judge(free, copyright_license="CC-BY").copyright_license == "CC-BY"
    assert judge(free, copyright_license="CC-BY-NC") is LeftOut.LICENCE
    assert {judge(age_approx=age).age_approx for age in ("-5", "500", "forty", "nan", "inf")} == {None}
    assert judge(Eligibility(unconfirmed=True), diagnosis_confirm_type=None).diagnosis_confirm_type is None


def test_a_list_of_licences_is_read_or_refused():
    spelt = ("CC-0", "cc0", "CC0 1.0 Universal", "CC BY 4.0", "CC BY-NC 4.0 International")
    assert [licence_of(text) for text in spelt] == ["CC-0", "CC-0", "CC-0", "CC-BY", "CC-BY-NC"]
    assert {
        licence_of(text) for text in ("CC-BY-SA", "CC-BY-NC-ND 4.0", "all rights reserved", "", None)
    } == {None}
    assert parse_licences(" cc-0, CC-BY ,") == {Licence.CC_0, Licence.CC_BY}
    with pytest.raises(InvalidField, match="'cc-by-sa' is none of CC-0, CC-BY, CC-BY-NC"):
        parse_licences("cc-0,cc-by-sa")
    with pytest.raises(InvalidField, match="Name at least one"):
        parse_licences(",")


@pytest.mark.parametrize(
    ("general", "path", "site"),
    [
        ("palms/soles", "Lower extremity", "palms/soles"),
        (None, "Trunk:Posterior trunk:Upper back", "posterior torso"),
        (None, "Trunk", "torso"),
        (None, "Upper extremity:Hand:Palm of hand:Thenar eminence", "palms/soles"),
        (None, "Upper extremity:Hand:Dorsum of hand", "upper extremity"),
        (None, "Head and neck:Head:Face:Mouth:Tongue", "oral/genital"),
        ("somewhere", "", None),
        (None, "Elsewhere:Trunk", None),
    ],
)
def test_a_site_is_stated_or_follows_from_its_levels(general, path, site):
    assert site_of(general, path.split(":")) == site


def test_every_site_of_the_archive_has_a_general_one():
    known = pytest.importorskip(
        "isic_metadata.anatom_site_hierarchical", reason="isic-metadata is not installed"
    )
    vocabulary = [site.value for site in known.AnatomSiteEnum]
    assert set(SITES) <= set(vocabulary)
    assert all(site_of(None, value.split(":")) for value in vocabulary)
