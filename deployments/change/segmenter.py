"""Where the lesion is in an image, and whether that can be relied on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deployments.preprocess.pixels import InputGeometry, resize_to_input
from model_store.segmenter import DoubtLimits, StoredSegmenter
from model_store.session import open_session
from serve_app.domain.errors import ModelContractError

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


class OutlineDoubt(StrEnum):
    """Why an outline is not to be relied on."""

    NO_LESION = "no_lesion"
    TOUCHES_FRAME = "touches_frame"
    SEVERAL_COMPONENTS = "several_components"
    LOW_CONFIDENCE = "low_confidence"


@dataclass(frozen=True, slots=True)
class Outline:
    """The lesion in an image's own frame, H×W: its largest piece, without holes.

    `confidence` is the IoU with the truth that the network itself expects; `frame_share` of the frame's edge is
    lesion; `main_share` of all that was called lesion is this piece. Not to be relied on unless `sure`.
    """

    mask: Mask
    confidence: float
    frame_share: float
    main_share: float
    doubts: tuple[OutlineDoubt, ...]

    @property
    def sure(self) -> bool:
        """Whether nothing speaks against the outline."""
        return not self.doubts


class Segmenter:
    """A verified segmenter, ready to outline. Safe to call from several threads; each call uses `threads` cores."""

    def __init__(self, stored: StoredSegmenter, *, threads: int) -> None:
        """Raises ModelContractError when the graph has not the input and output that its manifest says."""
        manifest = stored.manifest
        graph = (stored.folder / manifest.onnx).read_bytes()
        self._session = open_session(graph, manifest.onnx, threads)
        self._geometry = InputGeometry.from_manifest(manifest.input)
        self._limits = manifest.doubts
        self._ports = manifest.input.name, manifest.output.logits
        side = self._geometry.side
        expected = {
            manifest.input.name: ("tensor(uint8)", [side, side, 3]),
            manifest.output.logits: ("tensor(float)", list(manifest.output.size)),
        }
        ports = [*self._session.get_inputs(), *self._session.get_outputs()]
        found = {port.name: (port.type, list(port.shape[1:])) for port in ports}
        if found != expected:
            raise ModelContractError(f"{manifest.onnx} has {found}, its manifest says {expected}.")

    def outline(self, pixels: NDArray[np.uint8]) -> Outline:
        """Outline the lesion in a decoded image of any shape, uint8 H×W×3."""
        image = Image.fromarray(pixels)
        return read_outline(self.logits(image), image.size, self._limits)

    def logits(self, image: Image.Image) -> Floats:
        """Log-odds that a place is lesion, in the coarse frame of the network's output."""
        name, logits = self._ports
        found: Floats = self._session.run([logits], {name: resize_to_input(image, self._geometry)[None]})[0][
            0
        ]
        return found


def read_outline(logits: Floats, size: tuple[int, int], limits: DoubtLimits) -> Outline:
    """The outline that log-odds h×w make in a frame of `size` (width, height), and what speaks against it.

    Expected IoU: with p the probability of a place, sum of p inside over the area inside plus the sum of p outside.
    """
    found = logits > 0.0
    piece = largest(found)
    lesion = filled(piece)
    p = 1.0 / (1.0 + np.exp(-np.clip(logits.astype(np.float64), -60.0, 60.0)))
    confidence = float(p[lesion].sum() / max(1.0, lesion.sum() + p[~lesion].sum()))
    main_share = float(piece.sum() / found.sum()) if found.any() else 1.0
    edge = np.concatenate([lesion[0], lesion[-1], lesion[1:-1, 0], lesion[1:-1, -1]])
    frame_share = float(edge.mean())
    judged = {
        OutlineDoubt.NO_LESION: lesion.mean() < limits.least_area,
        OutlineDoubt.TOUCHES_FRAME: frame_share > limits.frame_share,
        OutlineDoubt.SEVERAL_COMPONENTS: main_share < limits.main_share,
        OutlineDoubt.LOW_CONFIDENCE: confidence < limits.confidence,
    }
    doubts = tuple(doubt for doubt, holds in judged.items() if holds)
    # Other pieces and holes get the least that there is on the other side, and the border stays where the log-odds
    # between two places cross zero.
    kept = np.where(lesion, np.maximum(logits, 1e-3), np.minimum(logits, -1e-3)).astype(np.float32)
    mask = np.asarray(Image.fromarray(kept).resize(size, Image.Resampling.BILINEAR)) > 0.0
    return Outline(mask, confidence, frame_share, main_share, doubts)


def components(mask: Mask) -> NDArray[np.int64]:
    """Label the pieces of a mask by a number of their own, 0 outside; sides connect, corners do not.

    Every place takes the greatest label of its neighbours, then that of the place that its label names, until nothing
    changes: pieces fuse in about as many rounds as the logarithm of their length.
    """
    names = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        around = np.pad(names, 1)
        sides = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
        grown = np.where(mask, np.maximum(names, np.maximum.reduce(sides)), 0)
        grown = np.concatenate([[0], grown.ravel()])[grown]
        if np.array_equal(grown, names):
            return names
        names = grown


def largest(mask: Mask) -> Mask:
    """The largest piece of a mask; nothing of an empty one."""
    names = components(mask)
    areas = np.bincount(names.ravel())
    areas[0] = 0
    piece: Mask = mask & (names == areas.argmax())
    return piece


def filled(mask: Mask) -> Mask:
    """The mask and every hole in it: what does not reach the frame's edge outside it."""
    names = components(np.pad(~mask, 1, constant_values=True))
    outside: Mask = names[1:-1, 1:-1] == names[0, 0]
    return ~outside
