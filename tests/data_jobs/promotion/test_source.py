"""The file a model comes in: its digest before anything is parsed, never a pickle, and labels that are the eight."""

from __future__ import annotations

from collections.abc import Iterator
import hashlib
from http.server import BaseHTTPRequestHandler
import json
from pathlib import Path
import pickle
import struct
import zipfile

import pytest

from data_jobs.promotion.candidate import ImportRefused
from data_jobs.promotion.source import map_own_labels, read_label_map, sniff_kind, take_source
from serve_app.domain.diagnosis import TRAINED
from tests.http_server import serving

from .conftest import MILK10K, MILK10K_MAP, write_map

CONTENT = b"\x08\x0aa model, or so it says" * 1000


DIGEST = hashlib.sha256(CONTENT).hexdigest()
PAGES = {
    "/model.onnx": (200, {}, CONTENT),
    "/org/name/resolve/main/model.safetensors": (200, {}, CONTENT),
    "/elsewhere": (302, {"Location": "http://192.0.2.1/model.onnx"}, b""),
    "/within": (302, {"Location": "https://cdn.example/model.onnx"}, b""),
    "/short": (200, {"Content-Length": "1000"}, b"\x08" * 10),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers, body = PAGES.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(Handler) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


def test_a_download_with_its_digest_is_taken(server: str, folder: Path) -> None:
    path, digest = take_source(f"{server}/model.onnx", DIGEST.upper(), folder)
    assert path.read_bytes() == CONTENT
    assert digest == DIGEST


def test_a_name_on_the_hub_is_its_safetensors_file(server: str, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert take_source("hf-hub:org/name", DIGEST, folder)[0].read_bytes() == CONTENT
    with pytest.raises(ImportRefused, match="SHA-256"):
        take_source("hf-hub:org/name", None, folder)
    with pytest.raises(ImportRefused, match="ORGANISATION/NAME"):
        take_source("hf-hub:../../etc", DIGEST, folder)
    with pytest.raises(ImportRefused, match="cannot be had"):
        take_source("hf-hub:org/name@another", DIGEST, folder)


@pytest.mark.parametrize(
    ("url", "digest", "message"),
    [
        ("{}/model.onnx", None, "--sha256"),
        ("{}/model.onnx", "0" * 64, "it is not that file"),
        ("{}/model.onnx", "abc", "64 hex digits"),
        ("{}/missing", DIGEST, "cannot be had"),
        ("{}/elsewhere", DIGEST, "only https"),
        ("{}/within", DIGEST, "not allowed .--allow-host"),
        ("{}/short", DIGEST, "broke off|not that file"),
        ("http://example.org/m.onnx", DIGEST, "only https"),
        ("file:///etc/hostname", DIGEST, "only https"),
    ],
)
def test_a_download_that_cannot_be_trusted_is_refused(
    server: str, folder: Path, url: str, digest: str | None, message: str
) -> None:
    with pytest.raises(ImportRefused, match=message):
        take_source(url.format(server), digest, folder)


def test_a_file_too_large_is_refused_on_the_way(server: str, folder: Path) -> None:
    with pytest.raises(ImportRefused, match="larger than 100 bytes"):
        take_source(f"{server}/model.onnx", DIGEST, folder, max_bytes=100)


def test_a_local_file_is_copied_and_may_state_its_digest(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(CONTENT)
    assert take_source(str(path), None, folder)[1] == DIGEST
    with pytest.raises(ImportRefused, match="not that file"):
        take_source(str(path), "1" * 64, folder)
    assert path.read_bytes() == CONTENT


def safetensors(tensors: dict[str, int], cut: int = 0) -> bytes:
    header, offset = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [offset, offset + 4 * size]}
        offset += 4 * size
    text = json.dumps(header).encode()
    whole = struct.pack("<Q", len(text)) + text + bytes(offset)
    return whole[: len(whole) - cut]


def test_a_file_is_what_its_content_says(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(safetensors({"classifier.weight": 4}))
    assert sniff_kind(path) == "safetensors"
    path.write_bytes(CONTENT)
    assert sniff_kind(path) == "onnx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    assert sniff_kind(path) == "checkpoint"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"weights": [1.0]}), "pickle"),
        (b"", "neither"),
        (b"<html>not found</html>", "neither"),
        (safetensors({"a": 4}, cut=1), "cut short"),
        (safetensors({"a": 4}, cut=40), "longer than the file"),
        (struct.pack("<Q", 1 << 40) + b"{}", "longer than the file"),
        (struct.pack("<Q", 4) + b"{12}", "broken"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ImportRefused, match=message):
        sniff_kind(path)


def test_the_eight_in_another_order_are_put_in_ours() -> None:
    labels = sorted(TRAINED)
    mapped = map_own_labels(labels, "dermoscopic")
    assert [labels[i] for i in mapped.positions] == list(TRAINED)
    assert mapped.ignored == ()


def test_eleven_labels_need_an_explicit_mapping(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"AKIEC.*--label-map"):
        map_own_labels(MILK10K, "dermoscopic")
    mapped = read_label_map(write_map(tmp_path / "map.toml", MILK10K, MILK10K_MAP))
    assert " ".join(MILK10K[i] for i in mapped.positions) == "MEL NV BCC AKIEC BKL DF VASC SCCKA"
    assert mapped.ignored == ("BEN_OTH", "INF", "MAL_OTH")


def test_a_binary_model_is_refused_with_or_without_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="two labels"):
        map_own_labels(["benign", "malignant"], "dermoscopic")
    path = write_map(tmp_path / "map.toml", ["benign", "malignant"], {"benign": "NV", "malignant": "MEL"})
    with pytest.raises(ImportRefused, match="No mapping"):
        read_label_map(path)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "every label"),
        ({**MILK10K_MAP, "MEL": "ignored"}, "no label is MEL"),
        ({**MILK10K_MAP, "MAL_OTH": "MEL"}, "several labels are MEL"),
        ({**MILK10K_MAP, "MAL_OTH": "UNK"}, "UNK is none of"),
    ],
)
def test_a_mapping_that_is_not_one_to_one_is_refused(tmp_path: Path, mapping, message: str) -> None:
    with pytest.raises(ImportRefused, match=message):
        read_label_map(write_map(tmp_path / "map.toml", MILK10K, mapping))


def test_a_file_that_is_no_mapping_or_for_another_modality_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.toml"
    for text in ("", "not = [toml", "label_space = 1\nmodality = 'dermoscopic'"):
        path.write_text(text)
        with pytest.raises(ImportRefused):
            read_label_map(path)
    labels = [d.value for d in TRAINED]
    write_map(path, labels, dict(zip(labels, labels, strict=True)), modality="3D TBP tile")
    with pytest.raises(ImportRefused, match="3D TBP tile"):
        read_label_map(path)
