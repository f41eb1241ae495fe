"""What the drift simulation draws from: the service's own measures of real images, as they are and as shifted.

The images are HAM10000's of the fold that no shipped model was trained on, beside those of other clinics in that fold. Each is prepared, classified, embedded and
concluded on by the service's own code; the shifts are made on its prepared pixels. Takes 15 minutes of one core,
once: the measures are kept in a folder of the caller's, and never in the repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.dataset import LabelledImage, isic_folder, of_ham10000, read_rows
from data_jobs.training.evaluation.outcomes import LocalService
from data_jobs.training.evaluation.robustness import altered
from deployments.embedder.embedder import EmbeddingSpace
from deployments.preprocess.preprocess import PreparedImage
from deployments.risk.policy import read_policy
from model_store.registry import ModelStore

Rgb = NDArray[np.uint8]
TEST_FOLD = 0


def _looked_up(curves: NDArray[np.float64]) -> Callable[[Rgb], Rgb]:
    """Each channel through its own curve, 3×256 of 0 to 1."""
    tables = np.clip(np.rint(curves * 255.0), 0, 255).astype(np.uint8)
    return lambda pixels: np.stack([tables[c][pixels[..., c]] for c in range(3)], axis=-1)


def camera(strength: float) -> Callable[[Rgb], Rgb]:
    """Another camera's colours: 8 % more red, 12 % less blue and a gamma of 1.15, at strength 1."""
    gains = np.array([1.08, 1.0, 0.88]) ** strength
    levels = np.linspace(0.0, 1.0, 256) ** (1.15**strength)
    return _looked_up(np.clip(gains[:, None] * levels, 0.0, 1.0))


def darker(strength: float) -> Callable[[Rgb], Rgb]:
    """Half a stop less light at strength 1: linear light (IEC 61966-2-1) times 2^-0.5."""
    levels = np.linspace(0.0, 1.0, 256)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    linear *= 2.0 ** (-0.5 * strength)
    back = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return _looked_up(np.tile(back, (3, 1)))


#: The images as they are, each shift whole and by half, and a second device of the same clinic.
VIEWS: Mapping[str, Callable[[Rgb], Rgb]] = {
    "quiet": lambda pixels: pixels,
    "second device": camera(0.25),
    "camera": camera(1.0),
    "darker": darker(1.0),
    "half a camera": camera(0.5),
    "half as dark": darker(0.5),
}
#: Not drawn: the same fold's images from other clinics, and so of other cameras.
ELSEWHERE = "other clinics"

Measures = dict[str, NDArray[Any]]


def measured(folder: Path, models: Path, model_id: str | None, threads: int) -> dict[str, Measures]:
    """The measures of every view, by its name; read from `folder`, or made and kept there."""
    store = ModelStore(models)
    model = store.open(model_id or (models / "default").read_text().strip())
    folder.mkdir(parents=True, exist_ok=True)
    names = (*VIEWS, ELSEWHERE)
    paths = {name: folder / f"{model.manifest.model_id}.{name.replace(' ', '-')}.npz" for name in names}
    if missing := [name for name in names if not paths[name].exists()]:
        rows = [row for row in read_rows(isic_folder()) if row.fold == TEST_FOLD]
        home = of_ham10000(rows)
        service = LocalService(model, read_policy(), threads=threads)
        space = EmbeddingSpace.from_model(model, model.manifest.live_space)
        for name in missing:
            wanted = [row for row, at_home in zip(rows, home, strict=True) if at_home != (name == ELSEWHERE)]
            view = VIEWS.get(name, VIEWS["quiet"])
            seen = [altered(image, view(image.pixels)) for image in service.prepare(wanted, isic_folder())]
            np.savez(paths[name], allow_pickle=False, **_measure(service, space, wanted, seen))
    found = {}
    for name, path in paths.items():
        with np.load(path, allow_pickle=False) as arrays:
            found[name] = {key: arrays[key] for key in arrays.files}
    return found


def _measure(
    service: LocalService,
    space: EmbeddingSpace,
    rows: Sequence[LabelledImage],
    images: Sequence[PreparedImage],
) -> Measures:
    answers = service.answer(rows, images)
    qualities = [asdict(image.quality) for image in images]
    return {
        **{name: np.array([each[name] for each in qualities]) for name in qualities[0]},
        "nine": answers.nine,
        "embedding": space.embed(answers.scan.bottleneck).astype(np.float16),
        "level": answers.levels,
        "outcome": answers.outcomes,
        "diagnosis": np.array([row.diagnosis.value for row in rows]),
        "lesion": np.array([row.lesion for row in rows]),
    }
