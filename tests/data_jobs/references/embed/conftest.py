"""Folders of drawn references, good and bad."""

from __future__ import annotations

from collections.abc import Callable
import io
from pathlib import Path

import pytest

from cluster.sample_lesion import draw_lesion
from data_jobs.references.catalogue import CatalogueEntry, write_catalogue
from serve_app.domain.diagnosis import TRAINED


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory) -> Callable[..., Path]:
    """Draw a folder of n references; those at the positions of `bad` are no image, or missing."""

    def make(count: int, bad: tuple[int, ...] = ()) -> Path:
        folder = tmp_path_factory.mktemp("references")
        (folder / "images").mkdir()
        entries = []
        for number in range(count):
            isic_id = f"ISIC_{number:07d}"
            path = f"images/{isic_id}.jpg"
            entries.append(
                CatalogueEntry(
                    isic_id=isic_id,
                    lesion_id=f"IL_{number}" if number % 3 else None,
                    diagnosis=TRAINED[number % 8],
                    diagnosis_confirm_type="histopathology",
                    age_approx=50 if number % 2 else None,
                    copyright_license="CC-0",
                    attribution="Drawn",
                    path=path,
                )
            )
            if number in bad[:1]:
                continue
            content = b"not an image" if number in bad else _jpeg(number)
            (folder / path).write_bytes(content)
        write_catalogue(folder, entries)
        return folder

    return make


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_lesion(size=(240, 180), seed=seed).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
