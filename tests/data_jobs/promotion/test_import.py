"""Import of real files by the real steps; needs the train extra, and for calibration the archive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
import hashlib
from importlib import import_module
import io
import json
from pathlib import Path
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from benchmarks.baseline import LocalStages
from data_jobs.promotion.candidate import ImportRefused
from data_jobs.promotion.import_model import ImportRequest, import_model
from data_jobs.references.load import publish_bundled
from data_jobs.training.network import averaged_weights
from deployments.preprocess.decode import UploadLimits
from deployments.risk.policy import CURRENT_VERSION
from model_store.canary import read_canary
from model_store.registry import ModelStore
from model_store.session import InferenceSession
from serve_app.domain.assessment import EVERY_REFERENCE, Outcome
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.patient import ClinicalContext
from serve_app.lesions.assess import Assessor
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import live_model
from tests.model_folders import RECIPES
from tests.pools import connected

from .conftest import MILK10K, MILK10K_MAP, Rows, write_map, write_part

pytestmark = pytest.mark.torch

SIDE = 64
DECLARED = {"licence": "CC0-1.0", "training_data": "nothing: random weights"}


def write_graph(
    path: Path,
    labels: int = 11,
    *,
    kind: str = "UINT8",
    bottleneck: int = 512,
    batch: int | str = "N",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Mean colours of 8×8 tiles, a random projection to the bottleneck, a random classifier on that."""
    helper, types = onnx.helper, onnx.TensorProto
    random = np.random.default_rng(labels)
    tiles = (SIDE // 8) ** 2 * 3
    weights = {
        "scale": np.array(128.0, np.float32),
        "project": random.normal(0, 0.3, (tiles, bottleneck)).astype(np.float32),
        "classify": random.normal(0, 0.05, (bottleneck, labels)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["numbers"], to=types.FLOAT),
        helper.make_node("Div", ["numbers", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["tiles"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["tiles"], ["flat"]),
        helper.make_node("MatMul", ["flat", "project"], ["features"]),
        helper.make_node("MatMul", ["features", "classify"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiles",
        [helper.make_tensor_value_info("image", getattr(types, kind), [batch, SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info("scores", types.FLOAT, [batch, labels]),
            helper.make_tensor_value_info("features", types.FLOAT, [batch, bottleneck]),
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if metadata:
        helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("import")


@pytest.fixture(scope="module")
def label_map(folder: Path) -> Path:
    return write_map(folder / "labels.toml", MILK10K, MILK10K_MAP)


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    text = (RECIPES / "mobilenetv3_large_100.toml").read_text()
    text = text.replace('"mobilenetv3_large_100"', '"tile_colours"', 1)
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def calibration_archive(isic_dir: Path, folder: Path) -> Path:
    """As many rows as calibration needs: 90 melanomas prove a sensitivity of 0.95 at 99 %, every class is there."""

    def choose(rows: Rows) -> Rows:
        chosen: Rows = []
        lesions: set[str] = set()
        room = {(fold, d.value): 3 for fold in "01234" for d in TRAINED} | {("4", "MEL"): 90}
        for row in rows:
            key, lesion = (row["fold"], row["diagnosis"]), row["lesion_id"] or row["isic_id"]
            if room[key] and lesion not in lesions:
                room[key] -= 1
                lesions.add(lesion)
                chosen.append(row)
        return chosen

    (folder / "archive").mkdir()
    return write_part(isic_dir, folder / "archive", choose)


@pytest.fixture(autouse=True)
def _small_archive(calibration_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERM_ISIC_DIR", str(calibration_archive))
    # One thread a step: others only wait for each other on so few images.
    for library in ("OMP", "OPENBLAS", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", "1")


@pytest.fixture
def steps_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps without a process each, which would import its libraries anew: what they refuse is told alike."""

    def run_step(module: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                import_module(module).main()
        except ValueError as error:
            raise ImportRefused(str(error)) from error
        return said.getvalue()

    for importer in ("source", "import_model"):
        monkeypatch.setattr(f"data_jobs.promotion.{importer}.run_step", run_step)
    # A tenth of the outliers: drawing them is most of an import of so few images.
    monkeypatch.setattr("data_jobs.training.outliers._VIEWS", 1)
    monkeypatch.setattr("data_jobs.training.outliers._DRAWN", 2)


@pytest.fixture
def request_for(folder: Path, recipe: Path) -> Callable[..., ImportRequest]:
    def make(source: Path | str, **given: object) -> ImportRequest:
        return ImportRequest(str(source), recipe, **{**DECLARED, **given})

    return make


@pytest.mark.usefixtures("steps_in_process")
@pytest.mark.timeout(600)
async def test_an_eleven_class_model_comes_in_with_a_mapping_and_answers(
    folder: Path, request_for, label_map: Path, new_database, isic_dir: Path
) -> None:
    """By all five stages, on a real image, with references in a database: another trunk and input size than ours."""
    store = folder / "models"
    store.mkdir()
    source = write_graph(folder / "milk10k.onnx")
    said: list[str] = []
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    model = import_model(store, request_for(source, label_map=label_map, sha256=digest), said.append)
    assert [path.name for path in store.iterdir()] == ["tile_colours.derm1"]
    assert any("max |Δlogit| 0.0e+00 over 8 images" in line for line in said), said
    manifest = ModelStore(store).open("tile_colours.derm1").manifest
    assert manifest.output.label_space == tuple(d.value for d in TRAINED)
    assert (manifest.licence, manifest.training_data) == tuple(DECLARED.values())
    assert manifest.input.mean == (0.485, 0.456, 0.406)
    assert manifest.live_space.count > 40
    assert {"acceptance.json", "origin.json", "evaluation.json", "MODEL_CARD.md"} <= set(manifest.files)
    assert read_canary(model).vectors.keys() == {manifest.live_space.embedding_space}
    origin = json.loads(model.path("origin.json").read_text())
    assert origin["sha256"] == digest
    assert origin["ignored_labels"] == ["BEN_OTH", "INF", "MAL_OTH"]
    acceptance = json.loads(model.path("acceptance.json").read_text())
    assert acceptance["max_melanoma_sensitivity_loss"] == 0.0
    # The eight logits are those of the file, in our order.
    pixels = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.uint8)
    scores = ort.InferenceSession(str(source)).run(["scores"], {"image": pixels})[0]
    eight = [label for d in TRAINED for label in MILK10K if MILK10K_MAP[label] == d]
    logits = InferenceSession(model, threads=1).run(pixels).logits
    assert np.array_equal(logits, scores[:, [MILK10K.index(label) for label in eight]])
    stated = {p.key: p.value for p in onnx.load(model.path("model.onnx")).metadata_props}
    assert stated == {"label_space": ",".join(TRAINED), "modality": "dermoscopic"}
    with pytest.raises(ImportRefused, match="is there already"):
        import_model(store, request_for(source, label_map=label_map), said.append)

    urls = await new_database()
    await publish_bundled(urls.owner, store, manifest.model_id)
    async with connected(urls.app) as pool:
        live = await live_model(pool)
        assert live is not None
        references = ReferenceStore(pool)
        limits, version = UploadLimits(), CURRENT_VERSION
        stages = LocalStages(
            models=store, references=references, limits=limits, threads=1, policy_version=version
        )
        assessor = Assessor(stages, service_version="test")
        image = min((isic_dir / "uploads").iterdir()).read_bytes()
        examination = await assessor.examine(image, live)
        assert examination.prepared.pixels.shape == (SIDE, SIDE, 3)
        case = SimpleNamespace(context=ClinicalContext(), top_k=3, reference_filter=EVERY_REFERENCE)
        answer = await assessor.assess(examination, case, previous=None)
    assert answer.outcome in {Outcome.DECIDED, Outcome.REVIEW}
    assert answer.provenance.model_id == manifest.model_id
    assert set(answer.classification.probabilities) == set(Diagnosis)
    assert sum(answer.classification.probabilities.values()) == pytest.approx(1.0)
    assert len(answer.similar) == 3
    assert answer.risk is not None


@pytest.mark.usefixtures("steps_in_process")
@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"labels": 11}, r"11 labels.*--label-map"),
        ({"labels": 8, "metadata": {"label_space": ",".join(TRAINED), "modality": "clinical"}}, "clinical"),
        (
            {"labels": 9, "metadata": {"label_space": ",".join(TRAINED), "modality": "dermoscopic"}},
            "9 logits",
        ),
        ({"kind": "FLOAT16"}, "uint8"),
        ({"bottleneck": 256}, "bottleneck"),
        ({"batch": 1}, "must be free"),
    ],
)
def test_what_does_not_keep_the_contract_is_refused(
    tmp_path: Path, request_for, graph: dict, message: str
) -> None:
    source = write_graph(tmp_path / "m.onnx", **graph)
    with pytest.raises(ImportRefused, match=message):
        import_model(tmp_path, request_for(source), print)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.usefixtures("steps_in_process")
def test_a_truncated_onnx_is_refused(tmp_path: Path, request_for, label_map: Path) -> None:
    whole = write_graph(tmp_path / "whole.onnx").read_bytes()
    source = tmp_path / "m.onnx"
    for kept in (len(whole) // 2, 40):
        source.write_bytes(whole[:kept])
        with pytest.raises(ImportRefused, match=r"no whole ONNX model|does not load"):
            import_model(tmp_path, request_for(source, label_map=label_map), print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "whole.onnx"]


def test_a_step_that_fails_leaves_nothing(tmp_path: Path, request_for, label_map: Path, monkeypatch) -> None:
    monkeypatch.setenv("DERM_ISIC_DIR", str(tmp_path))
    source = write_graph(tmp_path / "m.onnx")
    with pytest.raises(ImportRefused, match=r"^calibrate: .*train\.csv"):
        import_model(tmp_path, request_for(source, label_map=label_map), print)
    assert list(tmp_path.iterdir()) == [source]


def test_a_checkpoint_is_read_only_when_its_digest_is_stated(tmp_path: Path, request_for) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "touched",))

    source = tmp_path / "checkpoint.pt"
    torch.save({"ema": Evil()}, source)
    with pytest.raises(ImportRefused, match="only when it is our own"):
        import_model(tmp_path, request_for(source), print)
    # And even then as weights only.
    with pytest.raises(pickle.UnpicklingError):
        averaged_weights(source)
    assert not (tmp_path / "touched").exists()


def test_a_recipe_without_criteria_is_refused(tmp_path: Path) -> None:
    recipe = RECIPES / "tf_efficientnet_lite2_derm10.toml"
    with pytest.raises(ImportRefused, match=r"\[acceptance\]"):
        import_model(tmp_path, ImportRequest("m.onnx", recipe), print)
