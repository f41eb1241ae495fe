"""Decoding where nothing can be found: strangers' bytes are read in processes that have nothing else.

`python -m deployments.preprocess.decoder` imports everything, takes an account of its own (where root starts
it), leaves the network, and from then on only makes processes, one a connection. Each gives up files,
sockets, processes and threads for good before it reads a byte, so that a defect of a decoder finds no key, no
database, no Ray and no other process. After IMAGES images a fresh one takes its place: one that an image took
over sees no more than these. It answers in numbers and pixels, which the replica checks.

A message is the length of its header (4 bytes), the header (JSON; `bytes` is the length of what follows), and
the image, or the pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
import contextlib
from dataclasses import asdict, fields
import encodings
import gc
from importlib import import_module
import io
import json
import math
import os
from pathlib import Path
import pkgutil
import queue
import resource
import signal
import socket
import sys
import time
from typing import IO, Any
from uuid import uuid4
import warnings

import numpy as np
import PIL
from PIL import Image

from deployments.preprocess.decode import ContentType, UploadLimits
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import PreparedImage, prepare_image
from serve_app import sandbox
from serve_app.domain.assessment import QualityMeasures
from serve_app.domain.errors import (
    ImageTooSmall,
    RejectedUpload,
    StageFailed,
    TooLarge,
    UndecodableImage,
    UnsupportedImage,
)
from serve_app.private_files import forbid_core_dumps

MODULE = "deployments.preprocess.decoder"
#: Where the node's decoder listens; without it a replica starts one for itself.
ADDRESS = "DERM_DECODER"
#: How many images a process decodes: a fork costs as much as 10 ms of processor time, a hundredth of which is
#: nothing.
IMAGES = 100

_REFUSALS = {kind.__name__: kind for kind in (TooLarge, UnsupportedImage, UndecodableImage, ImageTooSmall)}
_CONTENT_TYPES: tuple[ContentType, ...] = ("image/jpeg", "image/png")
_LONGEST = 400  # of a refusal, characters
_MOST_HEADER = 4096
#: Of one image: processor time there, and time altogether.
_CPU_S, _WITHIN_S = 20, 30.0
_RESTART_S = 5.0  # a decoder that died is there again within that
_NOT_FOR_DECODING = ("__main__", "report", "ImageGrab", "ImageQt", "ImageShow", "ImageTk", "_tkinter_finder")
_MEMORY = 4 * 1024**3  # of addresses: several times what the largest image takes


class Decoder:
    """A replica's way to the decoder. Blocking calls, safe from several threads, each with its process."""

    def __init__(self, address: str | None = None) -> None:
        """Use the node's (`address`, or $DERM_DECODER), or start one that ends with the calling thread."""
        self._address = address or os.environ.get(ADDRESS) or f"\0derm-cds/decoder/{uuid4()}"
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._own = None
        if self._address.startswith("\0"):
            with sandbox.listen(self._address) as listener:
                self._own = sandbox.start(MODULE, listener, "--with-parent")

    def prepare_or_reject(
        self, data: bytes, geometry: InputGeometry, limits: UploadLimits
    ) -> PreparedImage | RejectedUpload:
        """Prepare one upload for a model, or say why not.

        An image under which a process dies, and a fresh one too, is undecodable. StageFailed without a
        decoder, and after 30 s.
        """
        header = {"geometry": asdict(geometry), "limits": asdict(limits)}
        for _ in range(2):
            process = self._process()
            spent = True  # one that says what it must not may be taken over
            try:
                if (answer := process.ask(header, data, most=3 * geometry.side**2)) is not None:
                    prepared = read_answer(*answer, geometry, limits)
                    spent = process.images >= IMAGES
                    return prepared
            finally:
                if spent:
                    process.close()
                else:
                    self._idle.put(process)
            self._let_go()  # the others may be of a decoder that is gone, too
        return UndecodableImage("The image made the decoder fail; nothing was stored.")

    def close(self) -> None:
        """Let go of every process."""
        self._let_go()
        if self._own is not None:
            self._own.kill()
            self._own.wait()

    def _process(self) -> _Process:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return _Process(self._address)

    def _let_go(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


class _Process:
    """A connection, and the process at its other end, which ends with it."""

    def __init__(self, address: str) -> None:
        """Connect, and wait until it has given everything up; StageFailed when there is none within 5 s."""
        self.images = 0
        deadline = time.monotonic() + _RESTART_S
        while not self._is_ready(address):
            if time.monotonic() > deadline:
                raise StageFailed("The decoder does not run.")
            time.sleep(0.05)

    def _is_ready(self, address: str) -> bool:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_WITHIN_S)
        self._answers = self._socket.makefile("rb")
        try:
            self._socket.connect(address)
            return _receive(self._answers, 0) is not None
        except (OSError, ValueError, LookupError, TypeError):
            self.close()
            return False

    def ask(self, header: Mapping[str, object], data: bytes, *, most: int) -> tuple[Any, bytes] | None:
        """Send an image: header and pixels of the answer; None where it died, or says what none may."""
        self.images += 1
        try:
            _send(self._socket, header, data)
            return _receive(self._answers, most)
        except TimeoutError as error:
            self.close()
            raise StageFailed("The decoder took too long.") from error
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def close(self) -> None:
        """End it."""
        self._answers.close()
        self._socket.close()


def read_answer(
    said: Any,  # noqa: ANN401 - whatever JSON may hold
    pixels: bytes,
    geometry: InputGeometry,
    limits: UploadLimits,
) -> PreparedImage | RejectedUpload:
    """What a decoder said, believed in nothing: StageFailed for what no decoder of ours says."""
    try:
        if "failed" in said:
            raise StageFailed(f"The decoder failed: {_plain(said['failed'])}")
        if "rejected" in said:
            return _REFUSALS[said["rejected"]](_plain(said["message"]))
        return _prepared(said, pixels, geometry, limits)
    except (ValueError, TypeError, LookupError) as error:
        raise StageFailed("The decoder answered what it must not.") from error


def _prepared(
    said: Mapping[str, Any], pixels: bytes, geometry: InputGeometry, limits: UploadLimits
) -> PreparedImage:
    width, height, content_type = said["width"], said["height"], said["content_type"]
    quality = QualityMeasures(
        **{each.name: float(said["quality"][each.name]) for each in fields(QualityMeasures)}
    )
    sound = (
        type(width) is type(height) is int
        and min(width, height) >= 1
        and width * height <= limits.max_pixels
        and content_type in _CONTENT_TYPES
        and all(map(math.isfinite, asdict(quality).values()))
    )
    if not sound:
        raise ValueError("not an image that may be")
    array = np.frombuffer(pixels, np.uint8).reshape(geometry.side, geometry.side, 3)
    return PreparedImage(array, width, height, content_type, quality)


def _plain(text: object) -> str:
    return "".join(letter for letter in str(text)[:_LONGEST] if letter.isascii() and letter.isprintable())


def _send(connection: socket.socket, header: Mapping[str, object], data: bytes) -> None:
    text = json.dumps({**header, "bytes": len(data)}).encode()
    connection.sendall(len(text).to_bytes(4) + text)
    connection.sendall(data)


def _receive(file: IO[bytes], most: int) -> tuple[Any, bytes] | None:
    """The next header and what follows it; None at the end. ValueError for more than `most`."""
    length = file.read(4)
    if len(length) < 4:
        return None
    if int.from_bytes(length) > _MOST_HEADER:
        raise ValueError("too long a header")
    header = json.loads(file.read(int.from_bytes(length)))
    if not 0 <= header["bytes"] <= most:
        raise ValueError("too many bytes")
    data = file.read(header["bytes"])
    return (header, data) if len(data) == header["bytes"] else None


def serve(connection: socket.socket) -> None:
    """Answer one connection to its end, as the process that does nothing else any more."""
    _give_up_all()
    with connection, connection.makefile("rb") as requests:
        _send(connection, {}, b"")  # ready
        while request := _receive(requests, sys.maxsize):
            asked, data = request
            used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (used + _CPU_S, IMAGES * _CPU_S))
            said, pixels = _answer(data, InputGeometry(**asked["geometry"]), UploadLimits(**asked["limits"]))
            _send(connection, said, pixels)


def _give_up_all() -> None:
    """Before the first byte of a stranger's: no file, no socket, no process, and an end to memory."""
    sandbox.restrict_files(network=False)
    sandbox.forbid_new_privileges()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sandbox.forbid_growth()


def _answer(data: bytes, geometry: InputGeometry, limits: UploadLimits) -> tuple[dict[str, object], bytes]:
    try:
        prepared = prepare_image(data, geometry, limits)
    except RejectedUpload as rejection:
        # Pillow's own errors have no number: this one is of the system, and says nothing of the image.
        if not isinstance(cause := rejection.__cause__, OSError) or cause.errno is None:
            return {"rejected": type(rejection).__name__, "message": str(rejection)}, b""
        return {"failed": f"{type(cause).__name__} {cause.errno}"}, b""
    except Exception as error:  # noqa: BLE001  where, but never what: it may quote the image
        *_, (code, line) = _places(error)
        return {"failed": f"{type(error).__name__} {Path(code).name}:{line}"}, b""
    said = {name: getattr(prepared, name) for name in ("width", "height", "content_type")}
    return {**said, "quality": asdict(prepared.quality)}, prepared.pixels.tobytes()


def _places(error: Exception) -> Iterator[tuple[str, int]]:
    place = error.__traceback__
    while place is not None:
        yield place.tb_frame.f_code.co_filename, place.tb_lineno
        place = place.tb_next


def _become(uid: int, gid: int) -> None:
    sandbox.leave_network()
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _import_everything() -> None:
    """Have in memory whatever is imported while images are decoded: later there are no files."""
    for package in (PIL, encodings):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(_NOT_FOR_DECODING):
                with contextlib.suppress(ImportError):  # of another system, or of a toolkit that is not here
                    import_module(module.name)
    picture = Image.new("RGB", (256, 256), (180, 120, 110))
    for kind in ("JPEG", "PNG"):
        with io.BytesIO() as file:
            picture.save(file, kind)
            _answer(file.getvalue(), InputGeometry(side=224), UploadLimits())


def main() -> None:
    """Make a process for each connection until ended."""
    parser = argparse.ArgumentParser(description="Decode images on an inherited socket.")
    parser.add_argument("listener", type=int)
    parser.add_argument("--account", type=int, nargs=2)
    parser.add_argument("--with-parent", action="store_true")
    parsed = parser.parse_args()
    if parsed.with_parent:
        sandbox.end_with_parent(signal.SIGKILL)
    listener = socket.socket(fileno=parsed.listener)
    forbid_core_dumps()
    warnings.simplefilter("ignore")
    _import_everything()
    if parsed.account:
        _become(*parsed.account)
    sandbox.forbid_new_privileges()
    sandbox.name("derm-decoder")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    gc.freeze()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            sandbox.end_with_parent(signal.SIGKILL)
            sandbox.name("derm-decoding")
            listener.close()
            try:
                serve(connection)
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
