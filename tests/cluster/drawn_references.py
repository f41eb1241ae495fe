"""A folder of references as `data_jobs.references.fetch` leaves it, of drawn images."""

from __future__ import annotations

from pathlib import Path

from data_jobs.references.catalogue import CatalogueEntry, write_catalogue
from data_jobs.sample_lesion import draw_lesion
from serve_app.domain.diagnosis import Diagnosis


def draw_references(folder: Path, count: int) -> Path:
    (folder / "images").mkdir(parents=True)
    entries = []
    for number in range(count):
        path = f"images/ISIC_{99_000_000 + number}.jpg"
        draw_lesion(size=(240, 180), seed=number).save(folder / path)
        entries.append(
            CatalogueEntry(
                isic_id=f"ISIC_{99_000_000 + number}",
                lesion_id=None,
                diagnosis=Diagnosis.NV,
                diagnosis_confirm_type="histopathology",
                copyright_license="CC-0",
                attribution="Drawn",
                path=path,
            )
        )
    write_catalogue(folder, entries)
    return folder
