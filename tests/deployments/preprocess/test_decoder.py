"""Decoding in a process that has nothing: the same answers as here, and what can be done from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import socket
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from PIL import Image, ImageCms
import psutil
import pytest

from cluster.accounts import DECODER, account_of
from deployments.preprocess import decoder as module
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.decoder import Decoder, read_answer
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import PreparedImage, prepare_image
from serve_app import sandbox
from serve_app.domain.assessment import QualityMeasures
from serve_app.domain.errors import RejectedUpload, StageFailed, UndecodableImage
from serve_app.settings import REPOSITORY
from tests.images import lesion_jpeg

GEOMETRY, LIMITS = InputGeometry(224), UploadLimits(min_side=32)
AS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    """One that a replica starts for itself."""
    decoder = Decoder()
    yield decoder
    decoder.close()


def _here(data: bytes) -> PreparedImage | RejectedUpload:
    try:
        return prepare_image(data, GEOMETRY, LIMITS)
    except RejectedUpload as rejection:
        return rejection


def _same(one: PreparedImage | RejectedUpload, other: PreparedImage | RejectedUpload) -> bool:
    if isinstance(one, RejectedUpload) or isinstance(other, RejectedUpload):
        return (type(one), str(one)) == (type(other), str(other))
    pixels = np.array_equal(one.pixels, other.pixels)
    parts = [(each.width, each.height, each.content_type, each.quality) for each in (one, other)]
    return pixels and parts[0] == parts[1]


def test_drawn_images_and_none_are_answered_as_here(decoder: Decoder, lesion, encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9286] = "a comment, ünd".encode("utf-16")
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    image = lesion(1200, 900)
    files = [
        encode(image, "JPEG", exif=exif),
        encode(image, "JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        encode(image, "JPEG", icc_profile=wide),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image.convert("P"), "PNG", transparency=0),
        encode(image.convert("I;16"), "PNG"),
        encode(image, "PNG", exif=exif),
        encode(image, "JPEG")[:20_000],
        encode(image, "GIF"),
        b"",
    ]
    assert [
        file for file in files if not _same(_here(file), decoder.prepare_or_reject(file, GEOMETRY, LIMITS))
    ] == []


def test_files_of_every_kind_are_answered_as_here(decoder: Decoder, corpora_dir: Path) -> None:
    """Where there are no files to open: what Pillow imports while it decodes is in memory already."""
    found = [path for path in sorted((corpora_dir / "images").rglob("*")) if path.is_file()][::7]
    differing = [
        path.name
        for path in found
        if not _same(_here(data := path.read_bytes()), decoder.prepare_or_reject(data, GEOMETRY, LIMITS))
    ]
    assert len(found) > 100
    assert differing == []


#: What code in the decoder tries, each a line that raises where it must not succeed.
_ATTACKS = {
    "read the key": "open({key!r}).read()",
    "delete the key": "os.unlink({key!r})",
    "look around": "os.listdir('/')",
    "leave a file": "open('/tmp/derm-decoder-left', 'w')",
    "call the node": "socket.create_connection(('127.0.0.1', {port}), 2)",
    "call Ray": "socket.socket(socket.AF_UNIX).connect({address!r})",
    "start a program": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "make a process": "os.fork() or os._exit(0)",
    "read the service's environment": "open('/proc/{service}/environ').read()",
    "end the service": "os.kill({service}, 0)",
    "end the decoder": "os.kill(os.getppid(), 0)",
    "be root": "os.setuid(0)",
    "have more files": "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
}
_TAKEN_OVER = """
import os, resource, signal, socket, sys
from deployments.preprocess import decoder
from serve_app.domain.errors import UndecodableImage
attacks = {attacks!r}
def attack(data, geometry, limits):
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    succeeded = []
    for name, line in attacks.items():
        try:
            eval(line)
            succeeded.append(name)
        except Exception:
            pass
    raise UndecodableImage(f"{{os.getpid()}} {{','.join(succeeded)}}")
decoder.prepare_image = attack
decoder._import_everything = lambda: None
if {free!r}:
    decoder._give_up_all = lambda: None
decoder.main()
"""


@contextmanager
def _taken_over(folder: Path, *arguments: object, key: Path, free: bool = False) -> Iterator[Decoder]:
    """A decoder in which every image runs all of the attacks; `free`: one that has given nothing up."""
    address = str(folder / "d")
    with socket.create_server(("127.0.0.1", 0)) as node:
        facts = {"key": str(key), "port": node.getsockname()[1], "address": address, "service": os.getpid()}
        attacks = {name: line.format(**facts) for name, line in _ATTACKS.items()}
        with sandbox.listen(address) as listener:
            command = [sys.executable, "-c", _TAKEN_OVER.format(attacks=attacks, free=free)]
            process = subprocess.Popen(
                [*command, str(listener.fileno()), *map(str, arguments)],
                cwd=REPOSITORY,
                pass_fds=[listener.fileno()],
                env={"OMP_NUM_THREADS": "1"},
            )
        decoder = Decoder(address)
        try:
            yield decoder
        finally:
            decoder.close()
            process.kill()
            process.wait()


def _succeeded(decoder: Decoder) -> tuple[int, list[str]]:
    answer = decoder.prepare_or_reject(b"", GEOMETRY, LIMITS)
    assert isinstance(answer, UndecodableImage)
    pid, _, names = str(answer).partition(" ")
    return int(pid), names.split(",") if names else []


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="derm-d-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


def _expected() -> list[str]:
    # Version 6 of Landlock keeps signals in: with an older one it can end its own parent, which comes back.
    return [] if sandbox.landlock_version() >= 6 else ["end the decoder"]


def test_each_attack_succeeds_in_a_process_that_has_given_nothing_up(folder: Path) -> None:
    key = folder / "keyring.json"
    key.write_text("the key")
    with _taken_over(folder, key=key, free=True) as decoder:
        assert set(_succeeded(decoder)[1]) == set(_ATTACKS) - (set() if AS_ROOT else {"be root"})
    Path("/tmp/derm-decoder-left").unlink()


@pytest.mark.parametrize("whose", ["the service's", "its own"] if AS_ROOT else ["its own"])
def test_a_decoder_that_an_image_took_over_finds_nothing(folder: Path, whose: str) -> None:
    """The key is of another account, as in a home of root's; and of the decoder's own, as in a user's."""
    key = folder / "keyring.json"
    key.write_text("the key")
    key.chmod(0o600)
    if whose == "its own" and not sandbox.landlock_version():
        pytest.skip("this kernel has no Landlock")
    account = account_of(DECODER) if AS_ROOT else None
    if account is not None and whose == "its own":
        for path in (folder, key):
            os.chown(path, account.uid, account.gid)
    with _taken_over(
        folder, *(("--account", account.uid, account.gid) if account else ()), key=key
    ) as decoder:
        pid, succeeded = _succeeded(decoder)
        assert succeeded == _expected()
        assert set(psutil.Process(pid).uids()) == {account.uid if account else os.geteuid()}
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "CapEff:\t0000000000000000" in status
        assert account is None or f"Groups:\t{account.gid}" not in status
    assert key.read_text() == "the key"


def test_what_kills_a_decoder_is_refused_and_the_next_image_is_not(folder: Path) -> None:
    with _taken_over(folder, key=folder / "none") as decoder:
        first, _ = _succeeded(decoder)
        assert isinstance(decoder.prepare_or_reject(b"crash", GEOMETRY, LIMITS), UndecodableImage)
        second, _ = _succeeded(decoder)
        assert second != first


def test_a_process_is_let_go_after_so_many_images(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What took one over sees no more than these."""
    monkeypatch.setattr(module, "IMAGES", 3)

    def pids() -> set[int]:
        own = decoder._own
        assert own is not None
        return {
            child.pid
            for child in psutil.Process(own.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE
        }

    decoder._let_go()
    seen = []
    for _ in range(6):
        assert not isinstance(decoder.prepare_or_reject(lesion_jpeg(), GEOMETRY, LIMITS), RejectedUpload)
        seen += sorted(pids() - set(seen))
    assert 2 <= len(seen) <= 3


def test_a_process_that_says_what_it_must_not_is_let_go(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONTENT_TYPES", ())
    decoder._let_go()
    with pytest.raises(StageFailed, match="what it must not"):
        decoder.prepare_or_reject(lesion_jpeg(), GEOMETRY, LIMITS)
    assert decoder._idle.empty()


def test_without_a_decoder_no_image_is_called_undecodable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESTART_S", 0.2)
    with pytest.raises(StageFailed, match="does not run"):
        Decoder(str(folder / "d")).prepare_or_reject(lesion_jpeg(), GEOMETRY, LIMITS)


@pytest.fixture(scope="module")
def true_answer() -> tuple[dict, bytes]:
    return module._answer(lesion_jpeg(), GEOMETRY, LIMITS)


#: What is said instead of what is true, and of the pixels how many.
_LIES: list[tuple[Any, slice]] = [
    ({}, slice(0, -1)),
    ({"width": 10**9}, slice(None)),
    ({"height": -1}, slice(None)),
    ({"width": "400"}, slice(None)),
    ({"content_type": "text/html"}, slice(None)),
    ({"quality": {}}, slice(None)),
    ({"quality": dict.fromkeys(QualityMeasures.__dataclass_fields__, float("nan"))}, slice(None)),
    ({"rejected": "SystemExit", "message": ""}, slice(0)),
    ({"failed": "a\x1b[31m\nlie"}, slice(0)),
    ([], slice(0)),
    (None, slice(0)),
]


@pytest.mark.parametrize(("lie", "kept"), _LIES)
def test_a_decoder_is_believed_in_nothing(true_answer: tuple[dict, bytes], lie: Any, kept: slice) -> None:
    said, pixels = true_answer
    assert isinstance(read_answer(said, pixels, GEOMETRY, LIMITS), PreparedImage)
    with pytest.raises(StageFailed) as failed:
        read_answer(said | lie if isinstance(lie, dict) else lie, pixels[kept], GEOMETRY, LIMITS)
    assert str(failed.value).isprintable()


def test_a_message_is_as_short_as_it_must_be() -> None:
    """What answers more than it was asked for is not read on."""
    one, other = socket.socketpair()
    with one, other, one.makefile("rb") as file:
        other.sendall((10**9).to_bytes(4))
        with pytest.raises(ValueError, match="header"):
            module._receive(file, 10)
        module._send(other, {}, b"x" * 11)
        with pytest.raises(ValueError, match="bytes"):
            module._receive(file, 10)
