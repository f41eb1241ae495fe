"""The nine diagnoses of ISIC 2019, in the order every array of this project uses."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Diagnosis(StrEnum):
    """ISIC 2019's classes. UNK is never trained: it is what an out-of-distribution decision yields."""

    #: The name a clinician reads.
    display_name: str

    MEL = "MEL", "Melanoma"
    NV = "NV", "Melanocytic naevus"
    BCC = "BCC", "Basal cell carcinoma"
    AK = "AK", "Actinic keratosis"
    BKL = "BKL", "Benign keratosis"
    DF = "DF", "Dermatofibroma"
    VASC = "VASC", "Vascular lesion"
    SCC = "SCC", "Squamous cell carcinoma"
    UNK = "UNK", "Unknown"

    def __new__(cls, value: str, display_name: str = "") -> Self:
        """Make a member of its value and name."""
        diagnosis = str.__new__(cls, value)
        diagnosis._value_, diagnosis.display_name = value, display_name
        return diagnosis


#: The eight a model can be trained on, in the order of its logits after mapping.
TRAINED: tuple[Diagnosis, ...] = tuple(d for d in Diagnosis if d is not Diagnosis.UNK)

#: Malignant or pre-malignant. AK is a carcinoma precursor: it counts here as it does in
#: the Skin Analytics DERM pathway, and is weighed on its own in the risk policy.
MALIGNANT: frozenset[Diagnosis] = frozenset({Diagnosis.MEL, Diagnosis.BCC, Diagnosis.SCC, Diagnosis.AK})
