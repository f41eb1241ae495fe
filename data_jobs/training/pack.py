"""Pack images for a machine without the archive: `python -m data_jobs.training.pack --recipe R --side 192 --output P`.

Every image that the recipe may train on, of both sources, as the service would prepare it: full-size ones at `--side`,
bcn84's at their own 84 pixels. `P/part-NN.npz` of at most 50 MB (`--limit`) have the images in one shuffled order with
what training must know of each (`data_jobs.training.parts`); `P/start.safetensors` what the network starts from (float16). A pack
that was stopped goes on with the same command; a folder with another pack's parts is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from tqdm import tqdm

from data_jobs.training.dataset import (
    LabelledImage,
    isic_folder,
    labels_of,
    load_pixels,
    read_bcn84,
    read_rows,
    sources_of,
    training_indices,
)
from data_jobs.training.network import DermNetwork, load_start
from data_jobs.training.parts import QUALITY, PackHeader, Part, Rows, encoded, read_parts, start_of
from data_jobs.training.recipe import BCN84_SIDE, SOURCES, DataPlan, Recipe, read_recipe
from data_jobs.training.steps import halved
from deployments.preprocess.pixels import PREPROCESS_VERSION, InputGeometry

_CHUNK = 256


def pack_images(
    rows: list[LabelledImage], plan: DataPlan, folder: Path, output: Path, side: int, limit: int
) -> list[Path]:
    """Write what is still missing of the parts of `rows`, each of at most `limit` bytes; returns all of them.

    Raises ValueError when `output` has parts of other images, another side or another plan.
    """
    found = training_indices(rows, plan)
    rows = [rows[i] for i in np.random.default_rng(plan.reserve_seed or 0).permutation(found)]
    columns: dict[str, Rows] = {
        "labels": labels_of(rows),
        "folds": np.array([row.fold for row in rows]),
        "sources": sources_of(rows),
    }
    named = [[row.isic_id, *(int(values[i]) for values in columns.values())] for i, row in enumerate(rows)]
    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    header = PackHeader(side, PREPROCESS_VERSION, QUALITY, len(rows), digest, PackHeader.plan_of(plan))
    output.mkdir(parents=True, exist_ok=True)
    parts = read_parts(output)
    if parts and parts[0].header != header:
        raise ValueError(f"{output} has parts of another pack: other images, another side or another plan.")
    first, number = sum(len(part.jpegs) for part in parts), len(parts)
    del parts
    jpegs: list[bytes] = []
    for place in tqdm(range(first, len(rows), _CHUNK), "images", mininterval=30.0):
        for jpeg in _encoded(rows[place : place + _CHUNK], folder, plan, side):
            # An image's columns and the archive's own tables take less than a hundred bytes and a few thousand.
            if jpegs and sum(map(len, jpegs)) + len(jpeg) + 100 * len(jpegs) + 10_000 > limit:
                first, number, jpegs = _written(header, first, number, jpegs, columns, output)
            jpegs.append(jpeg)
    if jpegs:
        _written(header, first, number, jpegs, columns, output)
    return sorted(output.glob("part-*.npz"))


def _encoded(rows: list[LabelledImage], folder: Path, plan: DataPlan, side: int) -> list[bytes]:
    """JPEGs of the rows, in their order."""
    jpegs = [b""] * len(rows)
    for source, own in zip(SOURCES, (side, BCN84_SIDE), strict=True):
        places = [i for i, row in enumerate(rows) if row.source == source]
        if places:
            pixels = load_pixels(rows, places, folder, InputGeometry(own, plan.interpolation))
            for i, image in zip(places, pixels, strict=True):
                jpegs[i] = encoded(image)
    return jpegs


def _written(
    header: PackHeader,
    first: int,
    number: int,
    jpegs: list[bytes],
    columns: dict[str, Rows],
    output: Path,
) -> tuple[int, int, list[bytes]]:
    """Write a part; returns where and as which number the next begins, and that it has nothing yet."""
    end = first + len(jpegs)
    mine = {name: values[first:end] for name, values in columns.items()}
    Part(header, first, jpegs, mine).write(output / f"part-{number:02d}.npz")
    return end, number + 1, []


def pack_start(recipe: Recipe, given: Path | None, path: Path) -> None:
    """Write what the recipe's network starts from, whole, under the name of that.

    Raises ValueError as `load_start` does.
    """
    network = DermNetwork(recipe.architecture, recipe.network)
    load_start(network, recipe, given)
    save_file(halved(network.state_dict()), path.with_suffix(".partial"), {"start": start_of(recipe)})
    path.with_suffix(".partial").rename(path)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--side", type=int, help="of full-size images (default: the recipe's cache_side)")
    parser.add_argument("--limit", type=int, default=50_000_000, help="bytes a part, at most (default 50 MB)")
    parser.add_argument("--start", type=Path, help="as of `train`: what [start] or [weights] names")
    arguments = parser.parse_args()
    recipe, folder = read_recipe(arguments.recipe), isic_folder()
    rows = read_rows(folder) + (read_bcn84(folder) if recipe.data.with_bcn84 else [])
    side = arguments.side or recipe.data.cache_side
    paths = pack_images(rows, recipe.data, folder, arguments.output, side, arguments.limit)
    pack_start(recipe, arguments.start, arguments.output / "start.safetensors")
    for path in [*paths, arguments.output / "start.safetensors"]:
        print(f"{path}\t{path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
