"""Which references a search may find."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.domain.diagnosis import Diagnosis


@dataclass(frozen=True, slots=True)
class ReferenceFilter:
    """Limits of a search, all of which hold; without any, every reference may be found.

    `licences` and `sites` (anatom_site_general) are in the archive's words, empty for any.
    `confirmed_only`: the archive must say how the diagnosis was confirmed (diagnosis_confirm_type).
    `diagnoses`: empty for any. A filter limits what is shown, never what an assessment weighs: the risk is drawn
    from the nearest of all references, and a malignant one that is hidden could lower it.
    """

    licences: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    confirmed_only: bool = False
    diagnoses: tuple[Diagnosis, ...] = ()

    def __bool__(self) -> bool:
        """Whether it limits anything."""
        return bool(self.licences or self.sites or self.confirmed_only or self.diagnoses)


EVERY_REFERENCE = ReferenceFilter()
