"""What the PMS says of the patient and the lesion."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from serve_app.domain.assessment import Shape, Share, one_of


class AnatomSite(StrEnum):
    """ISIC's `anatom_site_general`."""

    HEAD_NECK = "head/neck"
    UPPER_EXTREMITY = "upper extremity"
    LOWER_EXTREMITY = "lower extremity"
    ANTERIOR_TORSO = "anterior torso"
    POSTERIOR_TORSO = "posterior torso"
    LATERAL_TORSO = "lateral torso"
    TORSO = "torso"
    PALMS_SOLES = "palms/soles"
    ORAL_GENITAL = "oral/genital"


class Sex(StrEnum):
    """FHIR's administrative gender, which a PMS has; ISIC knows the first two and `unknown`."""

    FEMALE = "female"
    MALE = "male"
    OTHER = "other"
    UNKNOWN = "unknown"


class SkinType(StrEnum):
    """Fitzpatrick's phototypes: how the skin takes the sun, from always burns (I) to never burns (VI)."""

    I = "I"  # noqa: E741 - its name
    II = "II"
    III = "III"
    IV = "IV"
    V = "V"
    VI = "VI"


class BodyView(StrEnum):
    """From which side the body is seen that stands upright, arms a little off, palms forward."""

    ANTERIOR = "anterior"
    POSTERIOR = "posterior"
    LEFT_LATERAL = "left_lateral"
    RIGHT_LATERAL = "right_lateral"


@dataclass(frozen=True, slots=True)
class BodyPosition(Shape):
    """Where on the body a lesion is: a point of one view of it.

    `x`, `y`: shares of the frame around the whole body in that view, as whoever looks at it sees it: `x` from its left edge (0)
    to its right one (1), `y` from the crown (0) to the soles (1).
    """

    view: Annotated[BodyView, one_of(BodyView, "View")]
    x: Share
    y: Share


@dataclass(frozen=True, slots=True)
class History(Shape):
    """Risk history; None means that it was not stated."""

    personal_melanoma: bool | None = None
    personal_skin_cancer: bool | None = None
    family_melanoma: bool | None = None
    immunosuppression: bool | None = None

    @property
    def stated(self) -> bool:
        """Whether the PMS said anything at all."""
        return self != History()


@dataclass(frozen=True, slots=True)
class Checklist(Shape):
    """The weighted 7-point checklist (NICE NG12): major 2 points, minor 1, refer at 3 or more."""

    change_in_size: bool = False
    irregular_shape: bool = False
    irregular_colour: bool = False
    diameter_7mm_or_more: bool = False
    inflammation: bool = False
    oozing: bool = False
    change_in_sensation: bool = False

    @property
    def score(self) -> int:
        """Points, 0 to 10."""
        major = self.change_in_size + self.irregular_shape + self.irregular_colour
        minor = self.diameter_7mm_or_more + self.inflammation + self.oozing + self.change_in_sensation
        return 2 * major + minor


@dataclass(frozen=True, slots=True)
class PatientRecord:
    """What a directory of patients knows: age in whole years, never the date of birth."""

    age: int | None = None
    sex: Sex | None = None
    history: History = field(default_factory=History)


class Lookup(StrEnum):
    """How asking the directory of patients ended."""

    FOUND = "found"
    UNKNOWN = "unknown"
    NOT_AVAILABLE = "not_available"


@dataclass(frozen=True, slots=True)
class Discrepancy(Shape):
    """Where the caller and the patient's record differ: the field, what was sent, what is recorded."""

    field: str
    sent: str
    recorded: str


@dataclass(frozen=True, slots=True)
class RecordCheck(Shape):
    """What the directory of patients said while the image came in; `encounter` is None when none was named."""

    patient: Lookup
    encounter: Lookup | None = None
    discrepancies: tuple[Discrepancy, ...] = ()


@dataclass(frozen=True, slots=True)
class ClinicalContext(Shape):
    """What is on record beside the pixels; `record` is None where no directory is asked.

    All of it may change the risk but `skin_type` and `device` (maker and model), which describe, for reports, and `position`.
    """

    anatom_site_general: AnatomSite | None = None
    age_approx: int | None = None
    sex: Sex | None = None
    history: History = field(default_factory=History)
    checklist: Checklist | None = None
    record: RecordCheck | None = None
    skin_type: SkinType | None = None
    device: str | None = None
    position: BodyPosition | None = None
