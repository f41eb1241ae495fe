"""The archive's hierarchical body site (`anatom_site_1` to `anatom_site_5`) as `anatom_site_general`."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.domain.patient import AnatomSite

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


def site_of(general: str | None, levels: Sequence[str | None]) -> AnatomSite | None:
    """The general site: as the archive states it, else from its levels; None where it is not known."""
    if general in set(AnatomSite):
        return AnatomSite(general)
    path: list[str] = []
    found: AnatomSite | None = None
    for level in levels:
        if not level:
            break
        path.append(level.strip())
        found = SITES.get(":".join(path), found)
    return found
