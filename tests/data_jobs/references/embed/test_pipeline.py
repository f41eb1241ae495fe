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
from data_jobs.references.embed.job import count_done, run_job
from data_jobs.references.embed.pipeline import (
    EmbedImages,
    PrepareImages,
    Target,
    catalogue_table,
    split_rows,
)
from data_jobs.references.embed.resources import Resources
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
from serve_app.records.references import FailedReference, ReferenceCache
from tests.data_jobs.references.conftest import reference_image
from tests.pools import connected

ONE = Resources(actors=1)
IMAGES = 6


@pytest.fixture(scope="module")
def target(model: StoredModel, models: Path) -> Target:
    return Target(models, model.manifest.model_id, model.manifest.live_space.embedding_space)


@pytest.fixture(scope="module")
def geometry(model: StoredModel) -> InputGeometry:
    return InputGeometry.from_manifest(model.manifest.input)


def test_a_reference_has_the_vector_that_its_upload_would_have_and_a_bad_file_costs_nobody_else(
    make_folder, model, geometry, target
) -> None:
    folder = make_folder(4, bad=(1, 2))
    rows = embed(folder, geometry, target).to_pylist()
    assert [row["cause"] for row in rows] == [None, "unreadable", "unsupported_image", None]
    assert all(row["embedding"] is None and row["detail"] for row in rows[1:3])
    assert [row["age_approx"] for row in rows] == [None, 50, None, 50]
    store = ModelStore(target.models)
    classifier, embedder = Classifier(store), Embedder(store)
    for row in (rows[0], rows[3]):
        upload = (folder / "images" / f"{row['isic_id']}.jpg").read_bytes()
        pixels = prepare_image(upload, geometry, ARCHIVE_LIMITS).pixels
        (output,) = classifier.classify(target.model_id, [pixels])
        expected = embedder.embed(target.model_id, target.embedding_space, output.bottleneck)
        np.testing.assert_array_equal(np.frombuffer(row["embedding"], np.float32), expected)


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


def test_both_steps_in_one_process_give_what_they_give_apart(
    make_folder, geometry, target, monkeypatch
) -> None:
    monkeypatch.setattr("data_jobs.references.embed.pipeline._PREPARED_AT_ONCE", 4)
    folder = make_folder(6, bad=(0, 5))  # more than have their pixels in memory at a time
    table = catalogue_table(read_catalogue(folder))
    prepare = PrepareImages(folder, geometry, pictures=True)
    together = EmbedImages(target, ONE, prepare)(table)
    assert together.num_rows == 6
    assert together.equals(EmbedImages(target, ONE)(prepare(table)))
    of_bad = EmbedImages(target, ONE, prepare)(table.slice(5))
    assert of_bad["embedding"].null_count == of_bad.num_rows == 1


@pytest.mark.parametrize(
    ("images", "actors", "blocks"),
    [(50_000, 2, [256] * 195 + [80]), (300, 2, [38] * 7 + [34]), (3, 2, [3]), (0, 2, [])],
)
def test_blocks_are_of_a_transaction_and_enough_for_all_actors(
    images: int, actors: int, blocks: list[int]
) -> None:
    table = pa.table({"isic_id": list(map(str, range(images)))})
    assert [part.num_rows for part in split_rows(table, Resources(actors=actors))] == blocks


def test_a_space_that_the_model_lacks_is_refused(model) -> None:
    with pytest.raises(ModelContractError, match="has no space"):
        space_spec(model, "another.space")


@pytest.fixture(scope="module")
async def filled(make_folder, new_database, target):
    """A folder whose images are in the space, beside a failure of another folder's: the folder, the owner's URL."""
    folder, urls = make_folder(IMAGES), await new_database()
    images = [reference_image(entry) for entry in read_catalogue(folder)]
    model = ModelStore(target.models).open(target.model_id)
    async with connected(urls.owner) as pool:
        cache = ReferenceCache(pool)
        await cache.begin(identify_embedder(model, space_spec(model, None)), expected=IMAGES)
        lost = FailedReference("ISIC_9999999", "undecodable_image", "another folder's")
        vectors = np.eye(IMAGES, 512, dtype=np.float32)
        await cache.take_in(target.embedding_space, images, vectors, failures=[lost])
    return folder, urls.owner


def test_another_folders_failures_are_not_this_runs(filled, target) -> None:
    folder, dsn = filled
    said: list[str] = []
    report = run_job(folder, target, dsn, ONE, pictures=False, say=said.append)
    assert (report.expected, report.found, report.embedded) == (IMAGES, IMAGES, 0)
    assert report.failures == {}
    assert said[-1] == f"{IMAGES} of {IMAGES} images (100.0 %); none failed"


async def test_an_image_of_the_folder_that_failed_is_counted_once(filled, target) -> None:
    folder, dsn = filled
    names = {entry.isic_id for entry in read_catalogue(folder)}
    lost = FailedReference(min(names), "altered", "its picture is away, its vector is there")
    async with connected(dsn) as pool:
        cache, space = ReferenceCache(pool), target.embedding_space
        await cache.take_in(space, [], np.empty((0, 512), np.float32), failures=[lost])
        assert await count_done(cache, space, names) == (IMAGES - 1, {"altered": 1})
        assert await count_done(cache, space, names, pictures=True) == (0, {"altered": 1})
        assert await count_done(cache, space, {"ISIC_9999999"}) == (0, {"undecodable_image": 1})


def embed(folder: Path, geometry: InputGeometry, target: Target) -> pa.Table:
    prepare = PrepareImages(folder, geometry, pictures=True)
    return EmbedImages(target, ONE, prepare)(catalogue_table(read_catalogue(folder)))
