"""What the job makes of an image is what the service makes of it, and a bad file costs nobody else."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image
import pyarrow as pa
import pytest

from data_jobs.references.catalogue import read_catalogue
from data_jobs.references.embed.pipeline import split_rows
from data_jobs.references.embed.resources import Resources
from data_jobs.references.embed.steps import EmbedImages, PrepareImages, catalogue_table, embed_files
from data_jobs.references.embedder import (
    ARCHIVE_LIMITS,
    ReferenceEmbedder,
    identify_embedder,
    prepare_reference,
    space_spec,
)
from deployments.classifier.classifier import Classifier
from deployments.embedder.embedder import Embedder
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.errors import ModelContractError
from serve_app.records.reference_cache import FailedReference


@pytest.fixture(scope="module")
def model(models: Path, model_id: str) -> StoredModel:
    return ModelStore(models).open(model_id)


@pytest.fixture(scope="module")
def geometry(model: StoredModel) -> InputGeometry:
    return InputGeometry.from_manifest(model.manifest.input)


def test_a_reference_has_the_vector_that_its_upload_would_have(make_folder, model, geometry, models) -> None:
    folder = make_folder(3)
    table = _embed(_prepare(folder, geometry), model, models)
    store = ModelStore(models)
    classifier, embedder = Classifier(store), Embedder(store)
    space = model.manifest.live_space.embedding_space
    for row in table.to_pylist():
        upload = (folder / "images" / f"{row['isic_id']}.jpg").read_bytes()
        (output,) = classifier.classify(
            model.manifest.model_id, [prepare_image(upload, geometry, ARCHIVE_LIMITS).pixels]
        )
        expected = embedder.embed(model.manifest.model_id, space, output.bottleneck)
        np.testing.assert_array_equal(np.frombuffer(row["embedding"], np.float32), expected)


def test_bad_files_become_rows_with_a_cause_and_their_neighbours_are_embedded(
    make_folder, model, geometry, models
) -> None:
    folder = make_folder(6, bad=(1, 4))
    rows = _embed(_prepare(folder, geometry), model, models).to_pylist()
    assert [row["cause"] for row in rows] == [None, "unreadable", None, None, "unsupported_image", None]
    assert all((row["embedding"] is None) == (row["cause"] is not None) for row in rows)
    assert all(row["detail"] for row in rows if row["cause"])
    assert [row["age_approx"] for row in rows] == [None, 50, None, 50, None, 50]


def test_a_batch_of_nothing_but_bad_files_passes(make_folder, model, geometry, models) -> None:
    table = _embed(_prepare(make_folder(2, bad=(0, 1)), geometry), model, models)
    assert table.num_rows == 2
    assert table["embedding"].null_count == 2


def test_an_altered_file_is_not_what_was_fetched(make_folder, geometry) -> None:
    path = make_folder(1) / "images" / "ISIC_0000000.jpg"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert not isinstance(prepare_reference(path, "I", geometry, sha256=digest), FailedReference)
    found = prepare_reference(path, "I", geometry, sha256="0" * 64)
    assert isinstance(found, FailedReference)
    assert found.cause == "altered"


def test_a_picture_is_small_upright_and_without_metadata(tmp_path, geometry) -> None:
    stored = Image.new("RGB", (1600, 800), (200, 150, 130))
    stored.paste((20, 20, 20), (0, 0, 400, 800))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the dark end is up
    exif[0x010E] = "a patient's name"
    stored.save(tmp_path / "turned.jpg", exif=exif.tobytes())
    found = prepare_reference(tmp_path / "turned.jpg", "I", geometry)
    assert not isinstance(found, FailedReference)
    assert found.picture is not None
    shown = Image.open(io.BytesIO(found.picture.jpeg))
    assert shown.size == (found.picture.width, found.picture.height) == (192, 384)
    assert np.asarray(shown)[:80].mean() < 60 < np.asarray(shown)[120:].mean()
    assert not shown.getexif()
    assert found.picture.sha256 == hashlib.sha256(found.picture.jpeg).hexdigest()


def test_what_else_is_in_a_batch_changes_no_vector(make_folder, model, geometry) -> None:
    folder = make_folder(5)
    pixels = np.stack(
        [
            prepare_reference(folder / entry.path, entry.isic_id, geometry).pixels
            for entry in read_catalogue(folder)
        ]
    )
    spec = space_spec(model, None)
    one_by_one = ReferenceEmbedder(model, spec).embed(pixels)
    np.testing.assert_array_equal(ReferenceEmbedder(model, spec).embed(pixels[2:]), one_by_one[2:])
    fixed = ReferenceEmbedder(model, spec, batch=4)
    np.testing.assert_array_equal(fixed.embed(pixels)[4:], fixed.embed(pixels[4:]))
    np.testing.assert_allclose(fixed.embed(pixels), one_by_one, atol=1e-5)
    assert ReferenceEmbedder(model, spec).embed(pixels[:0]).shape == (0, 512)


def test_both_steps_in_one_process_give_what_they_give_apart(make_folder, geometry, model, models) -> None:
    folder = make_folder(35)  # more than have their pixels in memory at a time
    table = catalogue_table(read_catalogue(folder))
    prepare, spec = PrepareImages(folder, geometry, pictures=True), model.manifest.live_space
    embed = EmbedImages(
        models, model.manifest.model_id, spec.embedding_space, threads=1, device="cpu", batch=1
    )
    together = embed_files(table, prepare, embed)
    assert together.num_rows == 35
    assert together.equals(embed(prepare(table)))


@pytest.mark.parametrize(
    ("images", "actors", "blocks"),
    [(50_000, 2, [256] * 195 + [80]), (300, 2, [38] * 7 + [34]), (3, 2, [3]), (0, 2, [])],
)
def test_blocks_are_of_a_transaction_and_enough_for_all_actors(
    images: int, actors: int, blocks: list[int]
) -> None:
    table = pa.table({"isic_id": list(map(str, range(images)))})
    assert [part.num_rows for part in split_rows(table, Resources(actors=actors))] == blocks


def test_an_embedder_is_identified_by_what_decides_a_vector(model) -> None:
    spec = space_spec(model, None)
    known = identify_embedder(model, spec)
    assert known == identify_embedder(model, spec)
    assert len(known.digest) == 64
    with pytest.raises(ModelContractError, match="has no space"):
        space_spec(model, "another.space")


def _prepare(folder: Path, geometry: InputGeometry) -> pa.Table:
    step = PrepareImages(folder, geometry, pictures=True)
    return step(catalogue_table(read_catalogue(folder)))


def _embed(table: pa.Table, model: StoredModel, models: Path) -> pa.Table:
    spec = model.manifest.live_space
    step = EmbedImages(
        models, model.manifest.model_id, spec.embedding_space, threads=1, device="cpu", batch=1
    )
    return step(table)
