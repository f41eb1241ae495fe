"""Build, certify and ship a model's edge copies: `python -m data_jobs.training.edge.build --model M`.

For each kind of copy the first setting that passes the gate on the fold that the recipe calibrates on is measured once
on its test fold and on outliers. What passes is written into the model folder with `edge.json` (the certificates) and
`golden.json` (test vectors), and the folder is sealed anew; what fails is left out, and `edge.json` says why. Files
that were made already are read from `--work`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
import json
from pathlib import Path
import re
import shutil
import statistics
import time
from typing import Any

import numpy as np
import onnx

from data_jobs.training.dataset import (
    LabelledImage,
    build_cache,
    fold_indices,
    isic_folder,
    labels_of,
    read_rows,
)
from data_jobs.training.edge.certificate import (
    FoldImages,
    Judge,
    compare_fold,
    compare_outliers,
    gate_problems,
)
from data_jobs.training.edge.golden import golden_document
from data_jobs.training.edge.onnx_copies import Ranges, measure_ranges, plain_graph, write_float16, write_int8
from data_jobs.training.manifest_file import seal
from data_jobs.training.outliers import make_outliers
from data_jobs.training.recipe import DataPlan, read_recipe
from data_jobs.training.scan import Pixels, Run, open_onnx, scan_pixels
from deployments.preprocess.pixels import InputGeometry
from model_store.edge_copies import EDGE_NAME, GOLDEN_NAME, Runtime, server_contract
from model_store.registry import ModelStore, StoredModel, digest_file

#: Images of each diagnosis that activations are measured on.
CALIBRATION_IMAGES = 16
SEED = 20261126
#: What an app may carry, for any copy.
MOST_BYTES = 15_000_000


@dataclass(frozen=True)
class Source:
    """What every candidate is made from: the plain graph and the calibration images; `work` keeps files."""

    graph: onnx.ModelProto
    images: Pixels
    work: Path

    @cached_property
    def ranges(self) -> Ranges:
        """How far every tensor reaches on the calibration images."""
        return measure_ranges(self.graph, self.images)


#: Writes the file of one setting of one kind of copy.
Make = Callable[[Source, Path], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A copy's name, its file in the model folder, what runs it, and the settings to try for it, best first."""

    name: str
    file: str
    runtime: Runtime
    precision: str
    settings: dict[str, Make]

    def open(self, path: Path, threads: int) -> Run:
        """A forward pass."""
        if self.runtime == "onnxruntime":
            return open_onnx(path, threads)
        # Only who builds or tests this copy needs the package.
        from data_jobs.training.edge.litert import open_litert  # noqa: PLC0415

        return open_litert(path, threads)


def _int8(float_nodes: tuple[str, ...]) -> Make:
    return lambda source, path: write_int8(source.graph, source.ranges, float_nodes, path)


def _litert_float16(source: Source, path: Path) -> None:
    # torch, litert-torch and AI Edge Quantizer: an environment of their own.
    from data_jobs.training.edge.litert import convert, halve_weights  # noqa: PLC0415

    float32 = source.work / "litert.float32.tflite"
    if not float32.exists():
        partial = float32.with_suffix(".partial")
        convert(source.graph, source.images.shape[1], partial)
        partial.rename(float32)
    halve_weights(float32, path)


#: More than half of the error of quantised weights comes from here, and few of the weights are here.
_EARLY = ("/conv_stem/", "/blocks.0/", "/blocks.1/", "/blocks.2/blocks.2.0/")
_HEAD = ("/reduce/", "/classify/")

#: The order of settings was found on fold 4; docs/edge-copies.md has the figures.
KINDS = (
    Kind(
        "float16",
        "model.float16.onnx",
        "onnxruntime",
        "float16",
        {"float16 weights": lambda source, path: write_float16(source.graph, path)},
    ),
    Kind(
        "int8",
        "model.int8.onnx",
        "onnxruntime",
        "int8",
        {
            "7-bit weights, early blocks and head float": _int8(_EARLY + _HEAD),
            "7-bit weights, head float": _int8(_HEAD),
        },
    ),
    Kind("litert", "model.tflite", "litert", "float16", {"float16 weights": _litert_float16}),
)


ROUNDS = 30
_WARM_UP = 3


def latency_ratio(server: Run, copy: Run, pixels: Pixels) -> dict[str, float]:
    """Medians in milliseconds and their ratio; turns alternate, so that a busy machine slows both."""
    taken: tuple[list[float], list[float]] = ([], [])
    for round_ in range(_WARM_UP + ROUNDS):
        image = pixels[round_ % len(pixels)][None]
        for run, times in zip((server, copy), taken, strict=True):
            start = time.perf_counter()
            run(image)
            if round_ >= _WARM_UP:
                times.append(1e3 * (time.perf_counter() - start))
    medians = [statistics.median(times) for times in taken]
    return {
        "rounds": ROUNDS,
        "server_ms": round(medians[0], 2),
        "copy_ms": round(medians[1], 2),
        "ratio": round(medians[1] / medians[0], 3),
    }


class Proof:
    """The server's answers on the images that copies are proven on, and the comparison with them."""

    def __init__(self, model: StoredModel, plan: DataPlan, cache: Path, threads: int) -> None:
        """Prepare every labelled image unless `cache` has them: a minute or two."""
        geometry = InputGeometry.from_manifest(model.manifest.input)
        folder = isic_folder()
        rows = read_rows(folder)
        pixels = build_cache(rows, folder, cache, geometry)
        self._judge, self.threads = Judge.from_model(model), threads
        self.calibration_images = _sample(rows, pixels, plan.train_folds)
        self.choosing, self.confirming = (
            fold_images(rows, pixels, fold) for fold in (plan.fitted_fold, plan.test_fold)
        )
        outliers = [o.pixels for o in make_outliers(geometry, SEED) if o.part == "test"]
        self._outliers = np.stack(outliers)
        self._server = model.path(model.manifest.onnx)
        self.run_server = open_onnx(self._server, threads)
        self._answers = {
            images.name: scan_pixels(self.run_server, images.pixels)
            for images in (self.choosing, self.confirming)
        }
        self._answers_to_outliers = scan_pixels(self.run_server, self._outliers)

    def compare(self, images: FoldImages, run: Run) -> tuple[dict[str, Any], list[str]]:
        """Figures of a copy on a fold, and what the gate has against them."""
        scans = self._answers[images.name], scan_pixels(run, images.pixels)
        figures = compare_fold(self._judge, images, *scans)
        return figures, gate_problems(images.name, figures)

    def outliers(self, run: Run) -> dict[str, float]:
        """Figures on photographs, text, noise and plain colours that p(UNK) was not fitted on."""
        return compare_outliers(self._judge, self._answers_to_outliers, scan_pixels(run, self._outliers))

    def latency(self, kind: Kind, path: Path) -> dict[str, float]:
        """A copy's time against the server's model, both on one core."""
        server, copy = open_onnx(self._server, threads=1), kind.open(path, threads=1)
        return latency_ratio(server, copy, self.calibration_images)


def fold_images(rows: list[LabelledImage], pixels: Pixels, fold: int) -> FoldImages:
    """One fold of the archive, in the order of the file."""
    indices = fold_indices(rows, [fold])
    return FoldImages(f"fold{fold}", [rows[i] for i in indices], pixels[indices])


def _sample(rows: list[LabelledImage], pixels: Pixels, folds: Iterable[int]) -> Pixels:
    """CALIBRATION_IMAGES of every diagnosis (or all there are), drawn from these folds."""
    rng = np.random.default_rng(SEED)
    indices = fold_indices(rows, folds)
    labels = labels_of([rows[i] for i in indices])
    picked = [rng.permutation(indices[labels == label])[:CALIBRATION_IMAGES] for label in np.unique(labels)]
    return np.asarray(pixels[np.sort(np.concatenate(picked))])


def certify(kind: Kind, source: Source, proof: Proof) -> tuple[dict[str, Any], Path | None]:
    """A kind's certificate, and its file when it may be shipped."""
    tried: list[dict[str, Any]] = []
    for setting in kind.settings:
        path = make(kind, setting, source)
        run, size = kind.open(path, proof.threads), path.stat().st_size
        figures, problems = proof.compare(proof.choosing, run)
        if size > MOST_BYTES:
            problems.append(f"{size} bytes; {MOST_BYTES} are allowed")
        tried.append({"setting": setting, "bytes": size, "problems": problems})
        tell(kind, setting, figures, problems)
        if problems:
            continue
        confirmed, problems = proof.compare(proof.confirming, run)
        tell(kind, setting, confirmed, problems)
        certificate = {
            "setting": setting,
            "tried": tried,
            "shipped": not problems,
            "problems": problems,
            proof.choosing.name: figures,
            proof.confirming.name: confirmed,
            "outliers": proof.outliers(run),
            "latency": proof.latency(kind, path),
        }
        return certificate, None if problems else path
    return {"tried": tried, "shipped": False, "problems": ["No setting passed the gate."]}, None


def make(kind: Kind, setting: str, source: Source) -> Path:
    """The setting's file in the working folder, made unless it is there."""
    path = source.work / f"{re.sub('[^a-z0-9]+', '-', setting)}.{kind.file}"
    if not path.exists():
        print(f"{kind.name}: making {setting}", flush=True)
        partial = path.with_name(f"partial.{path.name}")
        kind.settings[setting](source, partial)
        partial.rename(path)
    return path


def tell(kind: Kind, setting: str, figures: Mapping[str, Any], problems: list[str]) -> None:
    """One line of progress."""
    point = figures["operating_points"]["melanoma"]
    print(
        f"{kind.name}, {setting}: {figures['images']} images, top-1 agreement "
        f"{figures['top1_agreement']}, melanoma {point['sensitivity_server']:.4f} -> {point['sensitivity']:.4f}, "
        f"specificity {point['specificity_server']:.4f} -> {point['specificity']:.4f}, "
        f"bottleneck cosine {figures['bottleneck_cosine']['median']}; {'; '.join(problems) or 'passes'}",
        flush=True,
    )


def build(
    model: StoredModel, plan: DataPlan, cache: Path, work: Path, kinds: list[Kind], threads: int
) -> dict[str, Any]:
    """Build all copies and return `edge.json`; the model folder changes only when all is done."""
    served = model.path(model.manifest.onnx)
    graph = plain_graph(served, InputGeometry.from_manifest(model.manifest.input).side)
    work = work / model.manifest.files[model.manifest.onnx].sha256[:16]
    work.mkdir(parents=True, exist_ok=True)
    proof = Proof(model, plan, cache, threads)
    source = Source(graph, proof.calibration_images, work)
    copies, left_out, files, runs = {}, {}, {}, {}
    for kind in kinds:
        certificate, path = certify(kind, source, proof)
        if path is None:
            left_out[kind.name] = certificate
            continue
        files[kind.name], runs[kind.name] = path, (kind.precision, kind.open(path, threads))
        copies[kind.name] = {
            "file": kind.file,
            "runtime": kind.runtime,
            "precision": kind.precision,
            "bytes": path.stat().st_size,
            "sha256": digest_file(path),
            "certificate": certificate,
        }
    golden = golden_document(model, proof.run_server, runs)
    edge = {"server": server_contract(model), "copies": copies, "left_out": left_out}
    ship(model.folder, files, {EDGE_NAME: edge, GOLDEN_NAME: golden})
    seal(model.folder)
    return edge


def ship(folder: Path, files: Mapping[str, Path], documents: Mapping[str, Any]) -> None:
    """Write copies (by kind) and documents into `folder`; a copy of an earlier build that is not among them goes."""
    folder.mkdir(exist_ok=True)
    for kind in KINDS:
        (folder / kind.file).unlink(missing_ok=True)
        if kind.name in files:
            shutil.copyfile(files[kind.name], folder / kind.file)
    for name, content in documents.items():
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", type=Path, required=True, help="the model's: which folds do what")
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--cache-dir", type=Path, required=True, help="pixel cache, as of training")
    parser.add_argument("--work", type=Path, required=True, help="what is done already; may be deleted")
    parser.add_argument(
        "--copies", nargs="+", choices=[k.name for k in KINDS], default=[k.name for k in KINDS]
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = ModelStore(arguments.models).open(arguments.model)
    kinds = [kind for kind in KINDS if kind.name in arguments.copies]
    plan = read_recipe(arguments.recipe).data
    edge = build(model, plan, arguments.cache_dir, arguments.work, kinds, arguments.threads)
    if edge["left_out"]:
        parser.exit(1, f"Not shipped: {', '.join(edge['left_out'])}; {EDGE_NAME} says why.\n")


if __name__ == "__main__":
    main()
