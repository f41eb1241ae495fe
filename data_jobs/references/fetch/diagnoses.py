"""The archive's hierarchical diagnosis (`diagnosis_1` to `diagnosis_5`) in the eight classes of ISIC 2019.

ISIC 2019 (challenge.isic-archive.com/landing/2019) and HAM10000 (Tschandl et al. 2018, 10.1038/sdata.2018.161)
say what is in a class: BKL is seborrhoeic keratosis, solar lentigo and lichen-planus-like keratosis; VASC is
angioma, angiokeratoma, pyogenic granuloma and haemorrhage; SCC has the in-situ form (Bowen). What neither
puts into a class has none here: a reference that is wrong is worse than one that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.domain.diagnosis import Diagnosis

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


def diagnosis_of(levels: Sequence[str | None]) -> Diagnosis | None:
    """The class of `diagnosis_1`, `diagnosis_2`, …; None where it has none, however it is spelt.

    Levels after the first that is missing do not count: nobody knows what they belong to.
    """
    path: list[str] = []
    found: Diagnosis | None = None
    for level in levels:
        if not level:
            break
        path.append(level.strip())
        found = CLASSES.get(":".join(path), found)
    return found
