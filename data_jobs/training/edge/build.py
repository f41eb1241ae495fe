"""Build, certify and ship a model's edge copies: `python -m data_jobs.training.edge.build --model M`.

For each kind of copy the first setting that passes the gate on the recipe's calibration fold is
measured once on its test fold, where that is another one, and on outliers. What passes is written into the model folder with `edge.json` (the
certificates) and `golden.json` (test vectors), and the folder is sealed anew; what fails is
left out, and `edge.json` says why. Files that were made already are read from `--work`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import json
from pathlib import Path
import re
import shutil
from typing import Any

import numpy as np

from data_jobs.training.edge.candidates import KINDS, Candidate, Kind, Source, latency_ratio
from data_jobs.training.edge.certificate import Judge, compare_fold, compare_outliers, gate_problems
from data_jobs.training.edge.fold_images import Archive, Run
from data_jobs.training.edge.golden import golden_document
from data_jobs.training.edge.onnx_copies import plain_graph
from data_jobs.training.manifest_file import seal
from data_jobs.training.outliers import make_outliers
from data_jobs.training.plans import DataPlan
from data_jobs.training.recipe import read_recipe
from data_jobs.training.scan import Pixels, open_onnx, scan_pixels
from deployments.preprocess.pixels import InputGeometry
from model_store.edge_copies import EDGE_NAME, GOLDEN_NAME, server_contract
from model_store.registry import ModelStore, StoredModel, digest_file

#: Images of each diagnosis that activations are measured on.
CALIBRATION_IMAGES = 16
SEED = 20261126
#: What an app may carry, for any copy.
MOST_BYTES = 15_000_000


class Proof:
    """The server's answers on the images that copies are proven on, and the comparison with them."""

    def __init__(
        self, model: StoredModel, plan: DataPlan, archive: Archive, threads: int, sample: int | None
    ) -> None:
        self.calibration_fold = plan.calibration_fold
        self.other_folds = sorted({plan.test_fold} - {plan.calibration_fold})
        self._judge = Judge.from_model(model)
        outliers = [o.pixels for o in make_outliers(archive.geometry, SEED) if o.part == "test"]
        self._outliers = np.stack(outliers)
        self._folds = {
            number: archive.fold(number, sample) for number in (plan.calibration_fold, *self.other_folds)
        }
        self._server = model.path(model.manifest.onnx)
        self.threads = threads
        self.run_server = open_onnx(self._server, threads)
        self._answers = {n: scan_pixels(self.run_server, images.pixels) for n, images in self._folds.items()}
        self._answers_to_outliers = scan_pixels(self.run_server, self._outliers)

    def fold(self, number: int, run: Run) -> tuple[dict[str, Any], list[str]]:
        """Figures of a copy on a fold, and what the gate has against them."""
        images = self._folds[number]
        found = scan_pixels(run, images.pixels)
        figures = compare_fold(self._judge, images, self._answers[number], found)
        return figures, gate_problems(images.name, figures)

    def outliers(self, run: Run) -> dict[str, float]:
        """Figures on photographs, text, noise and plain colours that p(UNK) was not fitted on."""
        return compare_outliers(self._judge, self._answers_to_outliers, scan_pixels(run, self._outliers))

    def latency(self, kind: Kind, path: Path, pixels: Pixels) -> dict[str, float]:
        """A copy's time against the server's model, both on one core."""
        return latency_ratio(open_onnx(self._server, threads=1), kind.open(path, threads=1), pixels)


def certify(kind: Kind, source: Source, proof: Proof) -> tuple[dict[str, Any], Path | None]:
    """A kind's certificate, and its file when it may be shipped."""
    tried: list[dict[str, Any]] = []
    for candidate in kind.candidates:
        path = make(kind, candidate, source)
        run = kind.open(path, proof.threads)
        figures, problems = proof.fold(proof.calibration_fold, run)
        if path.stat().st_size > MOST_BYTES:
            problems.append(f"{path.stat().st_size} bytes; {MOST_BYTES} are allowed")
        tried.append({"setting": candidate.setting, "bytes": path.stat().st_size, "problems": problems})
        tell(kind, candidate, figures, problems)
        if problems:
            continue
        confirmed = {}
        for number in proof.other_folds:
            confirmed[f"fold{number}"], problems = proof.fold(number, run)
            tell(kind, candidate, confirmed[f"fold{number}"], problems)
        certificate = {
            "setting": candidate.setting,
            "tried": tried,
            "shipped": not problems,
            "problems": problems,
            f"fold{proof.calibration_fold}": figures,
            **confirmed,
            "outliers": proof.outliers(run),
            "latency": proof.latency(kind, path, source.images),
        }
        return certificate, None if problems else path
    return {"tried": tried, "shipped": False, "problems": ["No setting passed the gate."]}, None


def make(kind: Kind, candidate: Candidate, source: Source) -> Path:
    """The candidate's file in the working folder, made unless it is there."""
    path = source.work / f"{re.sub('[^a-z0-9]+', '-', candidate.setting)}.{kind.file}"
    if not path.exists():
        print(f"{kind.name}: making {candidate.setting}", flush=True)
        partial = path.with_name(f"partial.{path.name}")
        candidate.make(source, partial)
        partial.rename(path)
    return path


def tell(kind: Kind, candidate: Candidate, figures: Mapping[str, Any], problems: list[str]) -> None:
    """One line of progress."""
    point = figures["operating_points"]["melanoma"]
    print(
        f"{kind.name}, {candidate.setting}: {figures['images']} images, top-1 agreement "
        f"{figures['top1_agreement']}, melanoma {point['sensitivity_server']:.4f} -> {point['sensitivity']:.4f}, "
        f"specificity {point['specificity_server']:.4f} -> {point['specificity']:.4f}, "
        f"bottleneck cosine {figures['bottleneck_cosine']['median']}; {'; '.join(problems) or 'passes'}",
        flush=True,
    )


def build(
    model: StoredModel,
    plan: DataPlan,
    cache: Path,
    work: Path,
    kinds: list[Kind],
    threads: int,
    sample: int | None,
) -> dict[str, Any]:
    """Build all copies and return `edge.json`; the model folder changes only when all is done."""
    geometry = InputGeometry.from_manifest(model.manifest.input)
    graph = plain_graph(model.path(model.manifest.onnx), geometry.side)
    work = work / model.manifest.files[model.manifest.onnx].sha256[:16]
    work.mkdir(parents=True, exist_ok=True)
    archive = Archive.open(cache, geometry)
    source = Source(graph, archive.sample(plan.train_folds, CALIBRATION_IMAGES, SEED), work)
    proof = Proof(model, plan, archive, threads, sample)
    copies, left_out, files = {}, {}, {}
    for kind in kinds:
        certificate, path = certify(kind, source, proof)
        if path is None:
            left_out[kind.name] = certificate
            continue
        files[kind.name] = path
        copies[kind.name] = {
            "file": kind.file,
            "runtime": kind.runtime,
            "precision": kind.precision,
            "bytes": path.stat().st_size,
            "sha256": digest_file(path),
            "certificate": certificate,
        }
    golden = golden_document(
        model,
        proof.run_server,
        {
            kind.name: (kind.precision, kind.open(files[kind.name], threads))
            for kind in kinds
            if kind.name in files
        },
    )
    edge = {"server": server_contract(model), "copies": copies, "left_out": left_out}
    ship(model.folder if sample is None else work / "trial", files, {EDGE_NAME: edge, GOLDEN_NAME: golden})
    if sample is None:
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
    parser.add_argument("--sample", type=int, help="a trial on so many images a fold; ships nothing")
    arguments = parser.parse_args()
    model = ModelStore(arguments.models).open(arguments.model)
    kinds = [kind for kind in KINDS if kind.name in arguments.copies]
    plan = read_recipe(arguments.recipe).data
    edge = build(model, plan, arguments.cache_dir, arguments.work, kinds, arguments.threads, arguments.sample)
    if edge["left_out"]:
        parser.exit(1, f"Not shipped: {', '.join(edge['left_out'])}; {EDGE_NAME} says why.\n")


if __name__ == "__main__":
    main()
