"""Pictures of one lesion under two names: `python -m data_jobs.training.duplicates --model M --cache-dir C`.

2,446 images of train.csv name no lesion, and nothing else says that two images of the archive, or of the archive and
bcn84, show the same one. Candidates are near each other by perceptual hash (Zauner 2010), turned in any of four ways,
or, where no lesion is named, by a model's embedding; a pair is one lesion when ORB keypoints (Rublee et al., ICCV
2011) of both fit one similarity transform (RANSAC). Where such a pair lies in two folds, one of its lesions is trained
on no more and is no reference: never the one in the test fold. `duplicates.json` keeps them, lesion by lesion. A
picture that is mirrored, or without corners for keypoints, is not found.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from skimage.feature import ORB, match_descriptors
from skimage.measure import ransac
from skimage.transform import SimilarityTransform

from data_jobs.training.dataset import (
    BCN84_SIDE,
    EXCLUDED,
    LabelledImage,
    build_cache,
    isic_folder,
    read_bcn84,
    read_rows,
)
from data_jobs.training.scan import open_onnx, scan_pixels
from deployments.preprocess.pixels import InputGeometry

Rgb = NDArray[np.uint8]
Pair = tuple[int, int]
#: Of 64 bits; two unrelated images differ by 32 on average.
HASH_DISTANCE = 2
NEIGHBOURS = 1
COSINE = 0.97
#: Of some 2,500 pairs measured: copies had 120 and more of 200 keypoints, one lesion taken twice 24, two lesions
#: beside the same printed ruler 12, all others at most 8.
INLIERS = 16
ORB_SIDE = 224


def grey(pixels: Rgb, side: int) -> NDArray[np.float64]:
    """Luminance 0 to 1, side×side."""
    image = Image.fromarray(pixels).convert("L").resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float64) / 255.0


def perceptual_hashes(pixels: Rgb) -> NDArray[np.uint64]:
    """The hash of an image and of its three turned views: which of 64 low frequencies exceed the median."""
    small = grey(pixels, 32)
    views = [np.rot90(small, turns) for turns in range(4)]
    frequencies = np.stack([dctn(view, norm="ortho")[:9, :9].ravel()[1:65] for view in views])
    bits = frequencies > np.median(frequencies, axis=1, keepdims=True)
    packed: NDArray[np.uint64] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return packed


def near_hashes(hashes: NDArray[np.uint64]) -> Iterator[Pair]:
    """Pairs i < j of N×4 hashes of which one view's differs from the other's own by at most HASH_DISTANCE bits."""
    own = hashes[:, 0]
    for i, views in enumerate(hashes):
        distance = np.bitwise_count(views[:, None] ^ own[None, i + 1 :]).min(0)
        for j in np.flatnonzero(distance <= HASH_DISTANCE):
            yield i, i + 1 + int(j)


def near_embeddings(vectors: NDArray[np.float32], chunk: int = 512) -> Iterator[Pair]:
    """Pairs i < j of which one is among the other's NEIGHBOURS next, at a cosine of COSINE or more."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for start in range(0, len(unit), chunk):
        similarity = unit[start : start + chunk] @ unit.T
        similarity[np.arange(len(similarity)), start + np.arange(len(similarity))] = -1.0
        nearest = np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        for row, others in enumerate(nearest):
            for j in others[similarity[row, others] >= COSINE]:
                yield min(start + row, int(j)), max(start + row, int(j))


class Keypoints:
    """ORB keypoints of images, each found once."""

    def __init__(self, pixels: Sequence[Rgb]) -> None:
        self._pixels = pixels
        self._found: dict[int, tuple[NDArray[np.float64], NDArray[np.bool_]] | None] = {}

    def of(self, index: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
        """Positions and descriptors; None for an image without a corner."""
        if index not in self._found:
            orb: Any = ORB(n_keypoints=200, fast_threshold=0.03)  # type: ignore[no-untyped-call]
            try:
                orb.detect_and_extract(grey(self._pixels[index], ORB_SIDE))
                self._found[index] = orb.keypoints, orb.descriptors
            except RuntimeError:  # what it raises when it finds none
                self._found[index] = None
        return self._found[index]

    def inliers(self, pair: Pair) -> int:
        """How many matches agree on one similarity transform (mirrored pairs find none)."""
        first, second = (self.of(index) for index in pair)
        if first is None or second is None:
            return 0
        matches = match_descriptors(  # type: ignore[no-untyped-call]
            first[1], second[1], cross_check=True, max_ratio=0.85
        )
        if len(matches) < INLIERS:
            return 0
        points = first[0][matches[:, 0]], second[0][matches[:, 1]]
        model, inside = ransac(  # type: ignore[no-untyped-call]
            points, SimilarityTransform, min_samples=2, residual_threshold=3.0, max_trials=300, rng=0
        )
        return int(inside.sum()) if model and 0.4 < model.scale < 2.5 else 0


@dataclass(frozen=True, slots=True)
class Twin:
    """Two images of one lesion that the archive keeps apart."""

    kept: LabelledImage
    dropped: LabelledImage
    inliers: int


def across_folds(rows: list[LabelledImage], pairs: set[Pair]) -> list[Pair]:
    """The pairs that may leak: in two folds, so of two lesions by name."""
    return sorted((i, j) for i, j in pairs if rows[i].fold != rows[j].fold)


def twin_of(first: LabelledImage, second: LabelledImage, inliers: int, test_fold: int) -> Twin:
    """Which of the two stays: the one in the test fold, else the archive's before bcn84's, else the first lesion by name."""
    kept, dropped = sorted((first, second), key=lambda r: (r.fold != test_fold, r.source, r.lesion))
    return Twin(kept, dropped, inliers)


def write_excluded(twins: list[Twin], path: Path) -> None:
    """Write the dropped lesions, each with the pair that tells most, in order of name."""
    best: dict[str, Twin] = {}
    for twin in sorted(twins, key=lambda t: t.inliers):
        best[twin.dropped.lesion] = twin
    found = {
        lesion: {
            "image": twin.dropped.isic_id,
            "fold": twin.dropped.fold,
            "twin": twin.kept.isic_id,
            "twin_fold": twin.kept.fold,
            "inliers": twin.inliers,
        }
        for lesion, twin in sorted(best.items())
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="a model folder: its embedding finds neighbours"
    )
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--side", type=int, default=176, help="input side of that model")
    parser.add_argument("--test-fold", type=int, default=0)
    parser.add_argument("--output", type=Path, default=EXCLUDED)
    arguments = parser.parse_args()
    folder, cache = isic_folder(), arguments.cache_dir
    rows, other = read_rows(folder), read_bcn84(folder)
    pixels = [
        *build_cache(rows, folder, cache, InputGeometry(ORB_SIDE)),
        *build_cache(other, folder, cache, InputGeometry(BCN84_SIDE)),
    ]
    rows += other
    pairs = set(near_hashes(np.stack([perceptual_hashes(image) for image in pixels])))
    print(f"{len(pairs)} pairs by hash", flush=True)
    run = open_onnx(arguments.model / "model.onnx", threads=1)
    size = (arguments.side, arguments.side)
    embedded = []
    for start in range(0, len(pixels), 256):
        resized = [Image.fromarray(image).resize(size) for image in pixels[start : start + 256]]
        embedded.append(scan_pixels(run, np.stack([np.asarray(image) for image in resized])).bottleneck)
    # Only for images of no named lesion: of two named ones a neighbour is nearly always just a lesion of its kind.
    pairs |= {
        (i, j)
        for i, j in near_embeddings(np.concatenate(embedded))
        if not (rows[i].lesion_id and rows[j].lesion_id)
    }
    candidates = across_folds(rows, pairs)
    print(f"{len(pairs)} pairs with neighbours, {len(candidates)} across folds", flush=True)
    keypoints = Keypoints(pixels)
    scored = [(pair, keypoints.inliers(pair)) for pair in candidates]
    twins = [
        twin_of(rows[i], rows[j], inliers, arguments.test_fold)
        for (i, j), inliers in scored
        if inliers >= INLIERS
    ]
    write_excluded(twins, arguments.output)
    print(f"{len(twins)} pairs of one lesion, {len({t.dropped.lesion for t in twins})} lesions dropped")


if __name__ == "__main__":
    main()
