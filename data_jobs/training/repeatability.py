"""How much repeated captures of one lesion differ: `python -m data_jobs.training.repeatability`.

Half of the lesions of folds 1 to 4 that the archive has more than one image of make the limits, the other half tests
them; the limits go into the segmenter's folder. `--site CAPTURES --output FILE` makes a site's own limits: CAPTURES is
a CSV file of image pairs (columns `earlier` and `later`, paths beside the file, and if known `lesion`) or a folder with
a folder of images for each lesion. Captures of unchanged lesions are asked for, minutes apart, each taken anew.

The archive does not say how long lies between its captures, nor which device took them: its limits are wide. Near-identical
ones, made of one photograph, whatever their magnification, are left out: they would make the limits too narrow.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import csv
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
import hashlib
from itertools import combinations
import json
from pathlib import Path
import tomllib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_jobs.training.dataset import LabelledImage, isic_folder, read_rows
from data_jobs.training.evaluation.figures import RESAMPLES, resampled_weights
from data_jobs.training.manifest_file import write_digests
from data_jobs.training.probabilities import Floats, rounded
from data_jobs.training.segmenter.masks import is_cropped
from deployments.change.comparison import capture, examine
from deployments.change.metrics import METHOD
from deployments.change.registration import MOST_SCALE
from deployments.change.segmenter import Segmenter
from deployments.preprocess.decode import UploadLimits, decode_image
from model_store.manifest import MANIFEST_NAME
from model_store.segmenter import Limit, Repeatability, StoredSegmenter, Stratum, open_segmenter
from serve_app.domain.comparison import Metric, distance

FILE_NAME = "repeatability.json"
FOLDS = (1, 2, 3, 4)
SOURCE = "ISIC archive (HAM10000), repeated captures of unknown interval and device"
#: Fine detail this alike is one photograph's: hairs, bubbles and reflections lie where they lay (docs/change.md).
NEAR_IDENTICAL = 0.75
#: Magnifications this near count as one: what a hand's pressure and a refocused lens change.
ALIKE_SCALE = 1.25
#: Fewer pairs give no 95th percentile; fewer in a stratum give it so wide an interval that it is worth less than the next.
LEAST_PAIRS, LEAST_IN_STRATUM = 60, 150
COVERAGE = 0.95
_SEED = 17
#: Enough for the frame that images are compared in.
_DECODED_SIDE = 320
_LIMITS = UploadLimits(min_side=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """One comparison of two images of a lesion: how alike, by which metrics how changed, or what hindered it."""

    lesion: str
    images: tuple[str, str]
    scale: float
    inliers: int
    sharpness: float
    likeness: float
    changes: Mapping[Metric, float]
    hindrances: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file of a lesion; `squashed` from 4:3 to a square."""

    lesion: str
    path: Path
    squashed: bool = False

    def read(self) -> NDArray[np.uint8]:
        """Its pixels at true aspect, decoded as uploads are."""
        data = self.path.read_bytes()
        image = decode_image(data, _LIMITS, target_side=_DECODED_SIDE).image
        if self.squashed:
            image = image.resize((image.width * 4 // 3, image.height), Image.Resampling.BICUBIC)
        return np.asarray(image)


def archive_pictures(rows: Iterable[LabelledImage], folder: Path, folds: Sequence[int]) -> Iterator[Picture]:
    """HAM10000's images: all were of 4:3, and what the archive made of each is known."""
    for row in rows:
        if row.fold in folds and (row.lesion_id or "").startswith("HAM_"):
            squashed = row.aspect == "squashed" and not is_cropped(row)
            yield Picture(row.lesion, folder / row.path, squashed)


def site_pairs(captures: Path) -> list[tuple[Picture, Picture]]:
    """A site's own pairs, of a CSV file or a folder. Raises ValueError where there are none."""
    if captures.is_dir():
        lesions = sorted(path for path in captures.iterdir() if path.is_dir())
        pictures = [Picture(lesion.name, path) for lesion in lesions for path in sorted(lesion.iterdir())]
        pairs = repeated(pictures)
    else:
        with captures.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and not {"earlier", "later"} <= rows[0].keys():
            raise ValueError(f"{captures} needs the columns earlier and later.")
        named = [(row.get("lesion") or f"{row['earlier']} {row['later']}", row) for row in rows]
        pairs = [
            (
                Picture(lesion, captures.parent / row["earlier"]),
                Picture(lesion, captures.parent / row["later"]),
            )
            for lesion, row in named
        ]
    if not pairs:
        raise ValueError(f"{captures} has no repeated captures.")
    return pairs


def repeated(pictures: Iterable[Picture]) -> list[tuple[Picture, Picture]]:
    """All pairs of images of one lesion."""
    lesions: defaultdict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        lesions[picture.lesion].append(picture)
    return [pair for found in lesions.values() for pair in combinations(found, 2)]


def compare_all(pairs: Sequence[tuple[Picture, Picture]], segmenter: Segmenter, workers: int) -> list[Pair]:
    """Compare every pair; a lesion's images are prepared once."""
    lesions: defaultdict[str, list[tuple[Picture, Picture]]] = defaultdict(list)
    for pair in pairs:
        lesions[pair[0].lesion].append(pair)
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda group: _compare_lesion(group, segmenter), lesions.values()))
    return [pair for group in found for pair in group]


def _compare_lesion(pairs: Sequence[tuple[Picture, Picture]], segmenter: Segmenter) -> list[Pair]:
    captures = {
        picture: capture(picture.read(), segmenter)
        for picture in dict.fromkeys(picture for pair in pairs for picture in pair)
    }
    compared = []
    for earlier, later in pairs:
        found = examine(captures[earlier], captures[later])
        compared.append(
            Pair(
                earlier.lesion,
                (earlier.path.stem, later.path.stem),
                found.scale,
                found.fit.inliers if found.fit else 0,
                found.sharpness,
                found.aligned.likeness if found.aligned else 0.0,
                {metric: change.change for metric, change in found.changes.items()},
                tuple(each.obstacle.value for each in found.hindrances),
            )
        )
    return compared


def fit_strata(pairs: Sequence[Pair], seed: int = _SEED) -> tuple[Stratum, ...]:
    """Limits by magnification and sharpness. Raises ValueError with too few pairs for any.

    Strata of too few pairs are left out, and theirs count for the next that they fit.
    """
    cut = round(float(np.median([pair.sharpness for pair in pairs])), 1) if pairs else 0.0
    strata = [
        Stratum("like magnification, sharp", ALIKE_SCALE, cut, {}),
        Stratum("like magnification", ALIKE_SCALE, 0.0, {}),
        Stratum("sharp", MOST_SCALE, cut, {}),
        Stratum("any", MOST_SCALE, 0.0, {}),
    ]
    while True:
        groups = grouped(pairs, strata)
        counts = {s.name: _counts(groups[s.name]) for s in strata}
        small = [s for s in strata if min(counts[s.name][m] for m in Metric) < LEAST_IN_STRATUM]
        if not small or len(strata) == 1:
            break
        # The last takes what no other does: it grows by the one before it.
        strata.remove(small[0] if small[0] is not strata[-1] else strata[-2])
    if any(found[metric] < LEAST_PAIRS for found in counts.values() for metric in Metric):
        raise ValueError(
            f"Every metric needs {LEAST_PAIRS} pairs that can be compared; there are {dict(*counts.values())}."
        )
    return tuple(
        replace(s, limits={metric: fit_limit(groups[s.name], metric, seed) for metric in Metric})
        for s in strata
    )


def grouped(pairs: Sequence[Pair], strata: Sequence[Stratum]) -> dict[str, list[Pair]]:
    """The pairs of each stratum, by its name."""
    found: dict[str, list[Pair]] = {stratum.name: [] for stratum in strata}
    table = Repeatability("", "", "", METHOD, 0, 0, 0, tuple(strata))
    for pair in pairs:
        found[table.stratum(pair.scale, pair.sharpness).name].append(pair)
    return found


def _counts(pairs: Iterable[Pair]) -> Counter[Metric]:
    return Counter(metric for pair in pairs for metric in pair.changes)


def fit_limit(pairs: Sequence[Pair], metric: Metric, seed: int) -> Limit:
    """The distance that 95 % of the pairs stay within (ISO 5725-1's repeatability limit, without assuming a normal law)."""
    measured = [pair for pair in pairs if metric in pair.changes]
    found = np.array([distance(metric, pair.changes[metric]) for pair in measured])
    weights = resampled_weights([pair.lesion for pair in measured], RESAMPLES, seed)
    low, high = np.quantile(_quantiles(found, weights), (0.025, 0.975))
    limit = _quantiles(found, np.ones((1, len(found))))[0]
    told = [round(float(x), 4) for x in (limit, min(low, limit), max(high, limit))]
    return Limit(told[0], told[1], told[2], len(found))


def _quantiles(values: Floats, weights: Floats) -> Floats:
    """COVERAGE's quantile of N values under each of R×N weights."""
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], axis=1)
    places = (reached < COVERAGE * reached[:, -1:] - 1e-9).sum(1)
    return np.asarray(values[order][np.minimum(places, len(values) - 1)])


def makes(lesion: str) -> bool:
    """Whether a lesion is of the half that makes the limits; the other tests them."""
    return hashlib.sha256(lesion.encode()).digest()[0] % 2 == 0


def beyond_shares(pairs: Sequence[Pair], strata: Sequence[Stratum]) -> dict[str, Any]:
    """Which share of pairs of unchanged lesions is called changed, by stratum and metric, and in all."""
    groups = grouped(pairs, strata)
    called: defaultdict[str, list[bool]] = defaultdict(list)
    shares: dict[str, Any] = {}
    for stratum in strata:
        rows = {}
        for metric in Metric:
            beyond = [
                distance(metric, pair.changes[metric]) > stratum.limits[metric].high
                for pair in groups[stratum.name]
                if metric in pair.changes
            ]
            called[metric] += beyond
            rows[metric.value] = {
                "pairs": len(beyond),
                "beyond": rounded(np.mean(beyond)) if beyond else None,
            }
        shares[stratum.name] = rows
    shares["all"] = {
        m: {"pairs": len(b), "beyond": rounded(np.mean(b)) if b else None} for m, b in called.items()
    }
    return shares


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs that could be compared and are two photographs."""
    return [pair for pair in pairs if pair.changes and pair.likeness < NEAR_IDENTICAL]


def fit_repeatability(pairs: Sequence[Pair], source: str, graph: str) -> tuple[Repeatability, dict[str, Any]]:
    """Limits from one half of the lesions, and what they call changed in the other. ValueError with too few pairs."""
    kept = distinct(pairs)
    made, tested = ([p for p in kept if makes(p.lesion) is half] for half in (True, False))
    strata = fit_strata(made)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    dropped = sum(bool(pair.changes) for pair in pairs) - len(kept)
    lesions = len({pair.lesion for pair in made})
    found = Repeatability(source, created, graph, METHOD, lesions, len(made), dropped, strata)
    return found, {
        "pairs": len(pairs),
        "comparable": rounded(np.mean([bool(pair.changes) for pair in pairs])),
        "near_identical": dropped,
        "hindrances": dict(Counter(name for pair in pairs for name in set(pair.hindrances))),
        "made_of": len(made),
        "limits": {s.name: {m.value: asdict(limit) for m, limit in s.limits.items()} for s in strata},
        "tested": beyond_shares(tested, strata),
    }


def write_repeatability(found: Repeatability, path: Path) -> None:
    """Write the limits as JSON."""
    path.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


def seal(stored: StoredSegmenter, found: Repeatability) -> StoredSegmenter:
    """Write the limits into a segmenter's folder and its manifest; ModelContractError when it does not open then."""
    write_repeatability(found, stored.folder / FILE_NAME)
    with (stored.folder / MANIFEST_NAME).open("rb") as file:
        content = tomllib.load(file)
    for name in ("files", "repeatability"):
        content.pop(name, None)
    # The new key before the tables.
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    write_digests(stored.folder, {**content, "repeatability": FILE_NAME, **tables})
    return open_segmenter(stored.folder)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segmenter", type=Path, help="its folder; default: the one that ships")
    parser.add_argument(
        "--site", type=Path, help="a site's captures: a CSV file of pairs, or a folder of folders"
    )
    parser.add_argument("--name", help="of the site and its device, as answers name it")
    parser.add_argument("--output", type=Path, help="where a site's limits go")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--stride", type=int, default=1, help="to try things out: every so many lesions")
    arguments = parser.parse_args()
    if (arguments.site is None) != (arguments.output is None) or (arguments.site and not arguments.name):
        parser.error("--site, --name and --output go together.")
    stored = open_segmenter(arguments.segmenter or next(Path("model_store/segmenters").iterdir()))
    if arguments.site:
        pairs, source = site_pairs(arguments.site), arguments.name
    else:
        folder = isic_folder()
        pairs, source = repeated(archive_pictures(read_rows(folder), folder, FOLDS)), SOURCE
    compared = compare_all(pairs[:: arguments.stride], Segmenter(stored, threads=1), arguments.workers)
    found, report = fit_repeatability(compared, source, stored.graph)
    if arguments.output:
        write_repeatability(found, arguments.output)
    else:
        seal(stored, found)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
