"""How soon a drift is found, and how often one is seen where there is none: a clinic's years, drawn from real images.

`python -m benchmarks.drift --json`: the limits of serve_app/reports/drift.py (`--limits` so many years
set them anew), the alarms of 20 quiet years that had no part in that, and within how many images each shift is found.

The clinic: patients come one after another, each with a visit of 1 to 15 images (2.6 on average); half of a visit's
further images are drawn from the 40 most like its first, which gives the patients their likeness. On three days of ten
a second device is used, whose colours differ by a quarter of what another camera's do. Everything is drawn with
replacement from `drift_data`'s 2,048 images, and the same for equal seeds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift_data import ELSEWHERE, Measures, measured
from data_jobs.training.dataset import isic_folder, read_bcn84
from serve_app.domain.diagnosis import TRAINED
from serve_app.reports.drift import BASELINE, MEASURES, STEP, WINDOW, Images, distance, summarise
from serve_app.settings import model_folder

FloatArray = NDArray[np.float64]
Rng = np.random.Generator

#: Images of a visit, and how often; images of a day; how alike a patient's are; how often the second device is used.
VISITS = {1: 0.45, 2: 0.20, 3: 0.12, 4: 0.08, 5: 0.05, 6: 0.04, 8: 0.03, 10: 0.02, 15: 0.01}
A_DAY, ALIKE, NEAREST, SECOND = 20, 0.5, 40, 0.3
#: A year's images, and the years that must have one alarm at most.
A_YEAR, YEARS = 5_000, 20
#: Share of years in which one measure alone may alarm, and in which the one may that another case mix shows in: all
#: twelve together in 2 %, once in 50 years.
ONE_MEASURE, CASE_MIX = 0.0009, {"malignant": 0.01}
WITHIN = 300


@dataclass(frozen=True, slots=True)
class Stretch:
    """Images in a row: each measure's N×D numbers, and whose they are."""

    values: Mapping[str, FloatArray]
    patients: NDArray[np.intp]

    def then(self, later: Stretch) -> Stretch:
        """This one and another behind it, of other patients."""
        joined = {name: np.concatenate([found, later.values[name]]) for name, found in self.values.items()}
        return Stretch(joined, np.concatenate([self.patients, later.patients + self.patients.max() + 1]))


class Clinic:
    """Draws stretches of images; of each view what every measure gives is computed once."""

    def __init__(self, views: Mapping[str, Measures]) -> None:
        self._values = {name: values_of(found) for name, found in views.items()}
        home = views["quiet"]
        self._nearest = _nearest(self._values["quiet"], home["embedding"].astype(np.float64))
        self._diagnosis = home["diagnosis"].astype(str)
        self._elsewhere = len(views[ELSEWHERE]["diagnosis"])

    def draw(
        self, rng: Rng, count: int, *, view: str = "quiet", mix: Mapping[str, float] | None = None
    ) -> Stretch:
        """So many images as this view shows them; `mix`: of another mix of diagnoses."""
        sizes = rng.choice(list(VISITS), size=count, p=list(VISITS.values()))
        patients = np.repeat(np.arange(count, dtype=np.intp), sizes)[:count]
        first = np.searchsorted(patients, patients)
        if view == ELSEWHERE:
            picked = rng.integers(0, self._elsewhere, count)
            return Stretch({name: found[picked] for name, found in self._values[view].items()}, patients)
        chances = self._chances(mix)
        picked = rng.choice(len(chances), count, p=chances)
        alike = (np.arange(count) > first) & (rng.random(count) < ALIKE)
        near = self._nearest[picked[first[alike]]]
        reached = chances[near].cumsum(1)
        place = (reached < rng.random(len(near))[:, None] * reached[:, -1:]).sum(1)
        picked[alike] = near[np.arange(len(near)), place]
        second = np.repeat(rng.random(count // A_DAY + 1) < SECOND, A_DAY)[:count, None]
        shown = self._values[view]
        if view != "quiet":  # all devices are another, or all rooms
            return Stretch({name: found[picked] for name, found in shown.items()}, patients)
        other = self._values["second device"]
        return Stretch(
            {name: np.where(second, other[name][picked], found[picked]) for name, found in shown.items()},
            patients,
        )

    def _chances(self, mix: Mapping[str, float] | None) -> FloatArray:
        if mix is None:
            return np.full(len(self._diagnosis), 1.0 / len(self._diagnosis))
        here = Counter(self._diagnosis.tolist())
        chances = np.array([mix.get(diagnosis, 0.0) / here[diagnosis] for diagnosis in self._diagnosis])
        return np.asarray(chances / chances.sum())

    @property
    def mix(self) -> dict[str, float]:
        """Shares of the diagnoses at home."""
        here = Counter(self._diagnosis.tolist())
        return {diagnosis: here[diagnosis] / len(self._diagnosis) for diagnosis in here}


def values_of(found: Measures) -> dict[str, FloatArray]:
    """What every measure gives of a view's images."""
    quality = {
        name: np.asarray(found[name], np.float64)
        for name in ("sharpness", "exposure", "contrast", "colour", "red", "blue")
    }
    images = Images(
        quality,
        np.asarray(found["nine"], np.float64),
        np.asarray(found["embedding"], np.float64),
        found["level"].astype(str).tolist(),
        found["outcome"].astype(str).tolist(),
        np.arange(len(found["nine"])),
    )
    return {measure.name: measure.values(images) for measure in MEASURES}


def _nearest(values: Mapping[str, FloatArray], embedding: FloatArray) -> NDArray[np.int64]:
    """N×NEAREST: the images most like each, by the pixels' measures and ten main directions of the embedding."""
    measures = [values[name] for name in ("sharpness", "exposure", "contrast", "colour", "colour_balance")]
    main = np.linalg.svd(embedding - embedding.mean(0), full_matrices=False)[0][:, :10]
    features = np.concatenate([*measures, main], axis=1)
    features = (features - features.mean(0)) / features.std(0)
    features[:, -10:] *= 0.7
    norms = (features**2).sum(1)
    apart = norms[:, None] + norms[None] - 2.0 * features @ features.T
    return np.asarray(np.argsort(apart, axis=1)[:, :NEAREST])


def distances(stretch: Stretch) -> tuple[NDArray[np.int64], dict[str, FloatArray]]:
    """After how many images it was looked, and each measure's distance then: the first BASELINE are the baseline."""
    ends = np.arange(BASELINE + WINDOW, len(stretch.patients) + 1, STEP)
    found = {}
    for measure in MEASURES:
        values = stretch.values[measure.name]
        baseline = summarise(measure, values[:BASELINE], stretch.patients[:BASELINE])
        sums = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(0)])
        means = (sums[ends] - sums[ends - WINDOW]) / WINDOW
        found[measure.name] = distance(measure, baseline, means, WINDOW)
    return ends, found


def quiet_years(clinic: Clinic, seed: int, years: int, images: int = A_YEAR) -> Iterator[dict[str, float]]:
    """Of each year, every measure's greatest distance; each is another site's, with a baseline of its own."""
    for year in range(years):
        stretch = clinic.draw(np.random.default_rng([seed, year]), BASELINE + images)
        yield {name: float(found.max()) for name, found in distances(stretch)[1].items()}


def set_limits(clinic: Clinic, years: int) -> dict[str, float]:
    """Each measure's limit: what its greatest distance in a year exceeds in so few of them."""
    greatest = list(quiet_years(clinic, 1, years))
    shares = {measure.name: CASE_MIX.get(measure.name, ONE_MEASURE) for measure in MEASURES}
    return {
        name: round(float(np.quantile([year[name] for year in greatest], 1.0 - share)), 1)
        for name, share in shares.items()
    }


def alarms(clinic: Clinic, seed: int, years: int, images: int = A_YEAR) -> dict[str, Any]:
    """The alarms of quiet years: how many, in how many years, and of which measures."""
    by_measure: Counter[str] = Counter()
    with_any = 0
    for greatest in quiet_years(clinic, seed, years, images):
        over = [measure.name for measure in MEASURES if greatest[measure.name] > measure.limit]
        by_measure.update(over)
        with_any += bool(over)
    return {
        "years": years,
        "images_a_year": images,
        "alarms": by_measure.total(),
        "years_with_any": with_any,
        "by_measure": dict(by_measure),
    }


def detection(clinic: Clinic, seed: int, sites: int, shift: Mapping[str, Any]) -> dict[str, Any]:
    """Within how many images a shift is found, over sites; it comes 1,000 images after the first."""
    before, after, delays = 1_000, 1_000, []
    by_measure: Counter[str] = Counter()
    for site in range(sites):
        rng = np.random.default_rng([seed, site])
        ends, found = distances(clinic.draw(rng, before).then(clinic.draw(rng, after, **shift)))
        since = ends - before
        hits = {m.name: since[(since > 0) & (found[m.name] > m.limit)] for m in MEASURES}
        by_measure.update(name for name, at in hits.items() if at.size and at[0] <= WITHIN)
        delays.append(min((int(at[0]) for at in hits.values() if at.size), default=after + 1))
    return {
        f"found_within_{WITHIN}": float(np.mean(np.array(delays) <= WITHIN)),
        "median_images": float(np.median(delays)),
        "worst_images": max(delays),
        "by_measure": {name: count / sites for name, count in by_measure.most_common()},
    }


def shifts(clinic: Clinic) -> dict[str, dict[str, Any]]:
    """Each shift, as `draw` is told of it. Another mix: the other hospital's whose diagnoses bcn84 lists."""
    named = Counter(row.diagnosis.value for row in read_bcn84(isic_folder()))
    other = {diagnosis.value: named[diagnosis.value] / named.total() for diagnosis in TRAINED}
    half = {name: (share + clinic.mix.get(name, 0.0)) / 2.0 for name, share in other.items()}
    views = {
        name: {"view": name} for name in ("camera", "darker", ELSEWHERE, "half a camera", "half as dark")
    }
    return {**views, "another mix": {"mix": other}, "half of another mix": {"mix": half}}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    kept = Path.home() / ".cache" / "derm-drift"
    parser.add_argument("--cache", type=Path, default=kept, help="where the images' measures are kept")
    parser.add_argument("--models", type=Path, default=model_folder(), help="the folder of model folders")
    parser.add_argument("--model", help="its id (default: the one that ships)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--limits", type=int, default=0, metavar="YEARS", help="set the limits anew from so many"
    )
    parser.add_argument("--sites", type=int, default=200, help="of each shift")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parsed = parser.parse_args()
    if not any((isic_folder() / "images").glob("*.jpg")):
        parser.exit(2, f"No images in {isic_folder() / 'images'}; set DERM_ISIC_DIR.\n")
    clinic = Clinic(measured(parsed.cache, parsed.models, parsed.model, parsed.threads))
    report: dict[str, Any] = {
        "limits": {measure.name: measure.limit for measure in MEASURES},
        "set_anew": set_limits(clinic, parsed.limits) if parsed.limits else None,
        "quiet": alarms(clinic, 2, YEARS),
        "quiet_in_a_row": alarms(clinic, 5, YEARS, YEARS * A_YEAR),
        "quiet_at_other_rates": [alarms(clinic, 3, YEARS * 5, images) for images in (1_000, A_YEAR, 20_000)],
        "shifts": {name: detection(clinic, 4, parsed.sites, shift) for name, shift in shifts(clinic).items()},
    }
    if parsed.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['quiet']['alarms']} alarms in {YEARS} quiet years of {A_YEAR} images")
    for name, found in report["shifts"].items():
        print(
            f"{found[f'found_within_{WITHIN}']:6.1%} within {WITHIN} images, median {found['median_images']:.0f}  {name}"
        )


if __name__ == "__main__":
    main()
