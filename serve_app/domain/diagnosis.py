"""The nine diagnoses of ISIC 2019, in the order every array of this project uses."""

from __future__ import annotations

from enum import StrEnum


class Diagnosis(StrEnum):
    """ISIC 2019's classes. UNK is never trained: it is what an out-of-distribution decision yields."""

    MEL = "MEL"
    NV = "NV"
    BCC = "BCC"
    AK = "AK"
    BKL = "BKL"
    DF = "DF"
    VASC = "VASC"
    SCC = "SCC"
    UNK = "UNK"

    @property
    def display_name(self) -> str:
        """The name a clinician reads."""
        return _NAMES[self]


_NAMES = {
    Diagnosis.MEL: "Melanoma",
    Diagnosis.NV: "Melanocytic naevus",
    Diagnosis.BCC: "Basal cell carcinoma",
    Diagnosis.AK: "Actinic keratosis",
    Diagnosis.BKL: "Benign keratosis",
    Diagnosis.DF: "Dermatofibroma",
    Diagnosis.VASC: "Vascular lesion",
    Diagnosis.SCC: "Squamous cell carcinoma",
    Diagnosis.UNK: "Unknown",
}

#: The eight a model can be trained on, in the order of its logits after mapping.
TRAINED: tuple[Diagnosis, ...] = tuple(d for d in Diagnosis if d is not Diagnosis.UNK)

#: Malignant or pre-malignant. AK is a carcinoma precursor: it counts here as it does in
#: the Skin Analytics DERM pathway, and is weighed on its own in the risk policy.
MALIGNANT: frozenset[Diagnosis] = frozenset({Diagnosis.MEL, Diagnosis.BCC, Diagnosis.SCC, Diagnosis.AK})
