"""Whether an image of the archive can be a reference, and its catalogue entry if it can.

The archive's hierarchical diagnosis (`diagnosis_1` to `diagnosis_5`) becomes one of the eight classes of ISIC 2019.
ISIC 2019 (challenge.isic-archive.com/landing/2019) and HAM10000 (Tschandl et al. 2018, 10.1038/sdata.2018.161)
say what is in a class: BKL is seborrhoeic keratosis, solar lentigo and lichen-planus-like keratosis; VASC is
angioma, angiokeratoma, pyogenic granuloma and haemorrhage; SCC has the in-situ form (Bowen). What neither
puts into a class has none here: a reference that is wrong is worse than one that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from data_jobs.references.catalogue import ARCHIVE_LIMITS, CatalogueEntry, Licence, image_path, licence_of
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import Conflict
from serve_app.domain.patient import AnatomSite

T = TypeVar("T")

_MELANOMA = "Malignant:Malignant melanocytic proliferations (Melanoma)"
_FOLLICULAR = "Malignant:Malignant adnexal epithelial proliferations - Follicular"
_EPIDERMAL = "Malignant:Malignant epidermal proliferations"
_BENIGN_EPIDERMAL = "Benign:Benign epidermal proliferations"
_VASCULAR = "Benign:Benign soft tissue proliferations - Vascular"

#: A node of the hierarchy and everything below it, unless a longer entry says otherwise; None is no class.
CLASSES: dict[str, Diagnosis | None] = {
    _MELANOMA: Diagnosis.MEL,
    # The image shows a metastasis in the skin, not the primary tumour.
    f"{_MELANOMA}:Melanoma metastasis": None,
    "Benign:Benign melanocytic proliferations:Nevus": Diagnosis.NV,
    f"{_FOLLICULAR}:Basal cell carcinoma": Diagnosis.BCC,
    # The archive files AK under Indeterminate; it is the only thing there that has a class.
    "Indeterminate:Indeterminate epidermal proliferations:Solar or actinic keratosis": Diagnosis.AK,
    # HAM10000's own name for its whole benign-keratosis class.
    f"{_BENIGN_EPIDERMAL}:Pigmented benign keratosis": Diagnosis.BKL,
    f"{_BENIGN_EPIDERMAL}:Seborrheic keratosis": Diagnosis.BKL,
    f"{_BENIGN_EPIDERMAL}:Solar lentigo": Diagnosis.BKL,
    f"{_BENIGN_EPIDERMAL}:Lichen planus like keratosis": Diagnosis.BKL,
    "Benign:Benign soft tissue proliferations - Fibro-histiocytic:Dermatofibroma": Diagnosis.DF,
    # Vascular without a third level is how the archive files HAM10000's "vascular lesion".
    _VASCULAR: Diagnosis.VASC,
    # Reactive, inflammatory, of the vessel's wall, or nothing that dermoscopy would show as vascular.
    f"{_VASCULAR}:Acroangiodermatitis of Mali": None,
    f"{_VASCULAR}:Angiolymphoid hyperplasia with eosinophilia": None,
    f"{_VASCULAR}:Glomangiomyoma": None,
    f"{_VASCULAR}:Glomus tumor": None,
    f"{_VASCULAR}:Nevus anemicus": None,
    "Benign:Hemorrhagic lesions": Diagnosis.VASC,
    f"{_EPIDERMAL}:Squamous cell carcinoma in situ": Diagnosis.SCC,
    f"{_EPIDERMAL}:Squamous cell carcinoma, Invasive": Diagnosis.SCC,
    f"{_EPIDERMAL}:Squamous cell carcinoma, NOS": Diagnosis.SCC,
}


#: A node of the hierarchy and everything below it, unless a longer entry says otherwise.
SITES: dict[str, AnatomSite] = {
    "Head and neck": AnatomSite.HEAD_NECK,
    "Head and neck:Head:Face:Mouth": AnatomSite.ORAL_GENITAL,
    "Trunk": AnatomSite.TORSO,
    "Trunk:Anterior trunk": AnatomSite.ANTERIOR_TORSO,
    "Trunk:Lateral trunk": AnatomSite.LATERAL_TORSO,
    "Trunk:Posterior trunk": AnatomSite.POSTERIOR_TORSO,
    "Upper extremity": AnatomSite.UPPER_EXTREMITY,
    "Upper extremity:Hand:Palm of hand": AnatomSite.PALMS_SOLES,
    "Lower extremity": AnatomSite.LOWER_EXTREMITY,
    "Lower extremity:Foot:Sole of foot": AnatomSite.PALMS_SOLES,
    "Anogenital region": AnatomSite.ORAL_GENITAL,
}


def diagnosis_of(levels: Sequence[str | None]) -> Diagnosis | None:
    """The class of `diagnosis_1`, `diagnosis_2`, …; None where it has none, however it is spelt."""
    return _deepest(CLASSES, levels)


def site_of(general: str | None, levels: Sequence[str | None]) -> AnatomSite | None:
    """`anatom_site_general` as the archive states it, else from `anatom_site_1`, …; None where it is not known."""
    return AnatomSite(general) if general in set(AnatomSite) else _deepest(SITES, levels)


def _deepest(nodes: Mapping[str, T | None], levels: Sequence[str | None]) -> T | None:
    # Levels after the first that is missing do not count: nobody knows what they belong to.
    path: list[str] = []
    found: T | None = None
    for level in levels:
        if not level:
            break
        path.append(level.strip())
        found = nodes.get(":".join(path), found)
    return found


#: The archive's words for how a diagnosis was confirmed, in those of HAM10000, which the shipped references use.
#: "single contributor clinical assessment" is one person's opinion: not among them.
CONFIRMED = {
    "histopathology": "histo",
    "serial imaging showing no change": "follow_up",
    "single image expert consensus": "consensus",
    "confocal microscopy with consensus dermoscopy": "confocal",
}
_OLDEST = 120
_SKIN_TYPES = frozenset({"I", "II", "III", "IV", "V", "VI"})


class LeftOut(StrEnum):
    """Why an image is no candidate; the first that applies is counted."""

    BAD_ID = "isic_id that does not look like one"
    NOT_PUBLIC = "not public"
    NOT_DERMOSCOPIC = "not dermoscopic"
    NOT_A_PHOTOGRAPH = "altered or synthetic"
    LICENCE = "other licence"
    NO_ATTRIBUTION = "no attribution"
    NO_DIAGNOSIS = "no diagnosis"
    INDETERMINATE = "indeterminate diagnosis"
    OTHER_DIAGNOSIS = "diagnosis of none of the eight classes"
    UNCONFIRMED = "diagnosis not confirmed"
    TOO_LARGE = "larger than the service reads"
    TOO_SMALL = "smaller than the service reads"
    EXCLUDED = "excluded by --exclude"


@dataclass(frozen=True, slots=True)
class Eligibility:
    """What is asked of an image; `excluded`: isic_ids, lesion_ids and patient_ids to leave out."""

    licences: frozenset[Licence] = frozenset(Licence)
    unconfirmed: bool = False
    excluded: frozenset[str] = frozenset()

    def judge(self, record: Mapping[str, object], *, source: str) -> CatalogueEntry | LeftOut:
        """The entry of an image, or why it has none.

        `record`: the archive's fields, flat, as in its metadata.csv (an empty cell is a missing one);
        beside them may be `public`, `bytes` and, from a folder of ours, `diagnosis` (one of the eight) and `path`.
        """
        cells = {name: str(value).strip() for name, value in record.items() if value is not None}
        cells = {name: value for name, value in cells.items() if value}
        try:
            path = image_path(cells.get("isic_id", ""))
        except Conflict:
            return LeftOut.BAD_ID
        licence = licence_of(cells.get("copyright_license"))
        if (cause := self._unsuitable(cells, licence)) is not None or licence is None:
            return cause or LeftOut.LICENCE
        levels = [cells.get(f"diagnosis_{level}") for level in range(1, 6)]
        stated = cells.get("diagnosis")
        diagnosis = Diagnosis(stated) if stated in TRAINED else diagnosis_of(levels)
        if diagnosis is None:
            return _unclassified(levels)
        confirmed = cells.get("diagnosis_confirm_type", "")
        confirmed = CONFIRMED.get(confirmed, confirmed)
        if confirmed not in CONFIRMED.values() and not self.unconfirmed:
            return LeftOut.UNCONFIRMED
        sites = [cells.get(f"anatom_site_{level}") for level in range(1, 6)]
        skin = cells.get("fitzpatrick_skin_type")
        return CatalogueEntry(
            isic_id=cells["isic_id"],
            lesion_id=cells.get("lesion_id"),
            patient_id=cells.get("patient_id"),
            diagnosis=diagnosis,
            diagnosis_confirm_type=confirmed or None,
            age_approx=_age(cells.get("age_approx")),
            sex=cells.get("sex"),
            anatom_site_general=site_of(cells.get("anatom_site_general"), sites),
            fitzpatrick_skin_type=skin if skin in _SKIN_TYPES else None,
            image_type="dermoscopic",
            copyright_license=licence,
            attribution=cells["attribution"],
            source=source,
            path=path,
            bytes=_whole_number(cells.get("bytes")),
        )

    def _unsuitable(self, cells: Mapping[str, str], licence: Licence | None) -> LeftOut | None:
        names = {cells.get(name) for name in ("isic_id", "lesion_id", "patient_id")}
        sides = [_whole_number(cells.get(side)) for side in ("pixels_x", "pixels_y")]
        width, height = (side if side is not None else ARCHIVE_LIMITS.min_side for side in sides)
        causes = {
            LeftOut.NOT_PUBLIC: cells.get("public", "True").lower() != "true",
            LeftOut.NOT_DERMOSCOPIC: cells.get("image_type") != "dermoscopic",
            LeftOut.NOT_A_PHOTOGRAPH: cells.get("image_manipulation") in {"altered", "synthetic"},
            LeftOut.LICENCE: licence not in self.licences,
            LeftOut.NO_ATTRIBUTION: "attribution" not in cells,
            LeftOut.EXCLUDED: bool(names & self.excluded),
            LeftOut.TOO_LARGE: width * height > ARCHIVE_LIMITS.max_pixels
            or (_whole_number(cells.get("bytes")) or 0) > ARCHIVE_LIMITS.max_bytes,
            LeftOut.TOO_SMALL: min(width, height) < ARCHIVE_LIMITS.min_side,
        }
        return next((cause for cause, applies in causes.items() if applies), None)


def _unclassified(levels: list[str | None]) -> LeftOut:
    if not levels[0]:
        return LeftOut.NO_DIAGNOSIS
    return LeftOut.INDETERMINATE if levels[0] == "Indeterminate" else LeftOut.OTHER_DIAGNOSIS


def _age(cell: str | None) -> int | None:
    age = _whole_number(cell)
    return age if age is not None and 0 <= age <= _OLDEST else None


def _whole_number(cell: str | None) -> int | None:
    # Tools that know no missing integers write 55.0; what is no number is not known.
    try:
        return None if cell is None else int(float(cell))
    except (ValueError, OverflowError):
        return None
