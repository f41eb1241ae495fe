"""Images of the archive as its API describes them, small JPEGs, and folders of drawn references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from data_jobs.references.catalogue import CatalogueEntry, write_catalogue
from serve_app.domain.diagnosis import TRAINED
from serve_app.records.references import ReferenceImage
from tests.images import encode, lesion_jpeg

LEVELS = {
    "MEL": ("Malignant", "Malignant melanocytic proliferations (Melanoma)", "Melanoma Invasive"),
    "NV": ("Benign", "Benign melanocytic proliferations", "Nevus", "Nevus, Spitz"),
    "BKL": ("Benign", "Benign epidermal proliferations", "Seborrheic keratosis"),
    "DF": ("Benign", "Benign soft tissue proliferations - Fibro-histiocytic", "Dermatofibroma"),
    "cyst": ("Benign", "Cysts", "Milium"),
}


@cache
def jpeg(seed: int, side: int = 64) -> bytes:
    """A small JPEG that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "JPEG", quality=60)


def image_out(number: int, diagnosis: str = "NV", **changes) -> dict:
    """An ImageOut without `files`; `changes` go into clinical, or where their name belongs."""
    levels = {f"diagnosis_{level}": name for level, name in enumerate(LEVELS[diagnosis], 1)}
    clinical = {
        **levels,
        "diagnosis_confirm_type": "histopathology",
        "age_approx": 25 + 5 * (number % 12),
        "sex": ("female", "male")[number % 2],
        "anatom_site_general": ("head/neck", "upper extremity", "posterior torso")[number % 3],
        "lesion_id": f"IL_{number:07}",
    }
    image = {
        "isic_id": f"ISIC_{number:07}",
        "copyright_license": ("CC-0", "CC-BY", "CC-BY-NC")[number % 3],
        "attribution": "Hospital Clinic de Barcelona",
        "public": True,
        "metadata": {"acquisition": {"pixels_x": 1024, "pixels_y": 768, "image_type": "dermoscopic"}},
    }
    for name, value in changes.items():
        part = next((part for part in (image, image["metadata"]["acquisition"]) if name in part), clinical)
        part[name] = value
    image["metadata"]["clinical"] = {name: value for name, value in clinical.items() if value is not None}
    return image


@pytest.fixture
def new_image():
    return image_out


@pytest.fixture
def new_jpeg():
    return jpeg


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory) -> Callable[..., Path]:
    """Draw a folder of n references: at the positions of `bad` they are missing (the first) or no image.

    Those of `clinical` are no dermoscopic images, and no references.
    """

    def make(count: int, bad: tuple[int, ...] = (), clinical: tuple[int, ...] = ()) -> Path:
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
                    image_type="clinical: close-up" if number in clinical else "dermoscopic",
                    copyright_license="CC-0",
                    attribution="Drawn",
                    path=path,
                )
            )
            if number in bad[:1]:
                continue
            content = b"not an image" if number in bad else lesion_jpeg(number, (240, 180))
            (folder / path).write_bytes(content)
        write_catalogue(folder, entries)
        return folder

    return make


def reference_image(entry: CatalogueEntry) -> ReferenceImage:
    return ReferenceImage(**{field.name: getattr(entry, field.name) for field in fields(ReferenceImage)})
