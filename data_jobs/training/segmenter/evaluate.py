"""How well outlines match the experts', what clutter does to them, and whether the segmenter knows when it is wrong.

All in the square frame of the squashed image, by the served code; IoU does not depend on the aspect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import threshold_otsu

from data_jobs.training.dataset import LabelledImage
from data_jobs.training.evaluation.figures import RESAMPLES, interval, resampled_weights
from data_jobs.training.evaluation.robustness import CLUTTER
from data_jobs.training.operating_points import lower_bound
from data_jobs.training.probabilities import Floats, area_under_curve, rounded
from deployments.change.segmenter import Mask, Outline, OutlineDoubt, Segmenter, components, filled
from serve_app.domain.diagnosis import TRAINED

Pixels = NDArray[np.uint8]
#: Below it an outline failed: the ISIC 2018 challenge's threshold, from how far experts disagree (arXiv 1902.03368).
FAILED = 0.65
#: Of outlines that the segmenter is sure of, at least so many must not have failed (lower 95 % bound).
RELIABLE = 0.97
#: How many images are put under each kind of clutter, and how many outlines are timed.
CLUTTERED, TIMED = 500, 100
#: Those that leave the image as it lies: the ruler of `robustness` turns it, and the mask would lie elsewhere.
KINDS = ("round dark field", "ink strokes", "ink ring", "hair")


@dataclass(frozen=True, slots=True)
class Scored:
    """Outlines of N images, and each one's IoU with the expert's."""

    outlines: tuple[Outline, ...]
    iou: Floats

    @property
    def confidence(self) -> Floats:
        """What the segmenter expected."""
        return np.array([outline.confidence for outline in self.outlines])

    def doubted(self, *doubts: OutlineDoubt) -> NDArray[np.bool_]:
        """Which outlines have one of these doubts; any, if none is named."""
        wanted = set(doubts or OutlineDoubt)
        return np.array([bool(wanted & set(outline.doubts)) for outline in self.outlines])


def overlap(found: Mask, truth: Mask) -> float:
    """Intersection over union; 1 where both are empty."""
    union = (found | truth).sum()
    return float((found & truth).sum() / union) if union else 1.0


def score(segmenter: Segmenter, pixels: Pixels, truth: NDArray[np.bool_]) -> Scored:
    """Outline N images uint8 N×S×S×3 whose lesions are N×S×S."""
    outlines = tuple(segmenter.outline(image) for image in pixels)
    iou = [overlap(outline.mask, lesion) for outline, lesion in zip(outlines, truth, strict=True)]
    return Scored(outlines, np.array(iou))


def least_confidence(scored: Scored) -> float:
    """The least confidence that makes outlines without another doubt reliable, to two digits below.

    Raises ValueError when no limit does.
    """
    others = scored.doubted(*(set(OutlineDoubt) - {OutlineDoubt.LOW_CONFIDENCE}))
    for limit in np.arange(0.0, 1.0, 0.01):
        kept = scored.iou[~others & (scored.confidence >= limit)]
        if len(kept) and lower_bound(int((kept >= FAILED).sum()), len(kept)) >= RELIABLE:
            return float(round(limit, 2))
    raise ValueError("No confidence makes this segmenter's outlines reliable: it needs more training.")


def iou_figures(iou: Floats, lesions: Sequence[str], seed: int) -> dict[str, Any]:
    """Mean, median and share that did not fail, with 95 % intervals that resample lesions."""
    passed = iou >= FAILED
    weights = resampled_weights(list(lesions), RESAMPLES, seed)
    weights /= weights.sum(1, keepdims=True)
    return {
        "images": len(iou),
        "mean_iou": rounded(iou.mean()),
        "mean_iou_interval": interval(weights @ iou),
        "median_iou": rounded(np.median(iou)),
        "thresholded_iou": rounded(np.where(passed, iou, 0.0).mean()),
        "passed": rounded(passed.mean()),
        "passed_interval": interval(weights @ passed),
    }


def blue_otsu(pixels: Pixels) -> Mask:
    """The baseline: Otsu's threshold on the blue channel, smoothed; the piece nearest to the middle."""
    side = len(pixels)
    blue = Image.fromarray(pixels).resize((side // 4, side // 4), Image.Resampling.BOX)
    channel = np.asarray(blue)[..., 2]
    threshold = threshold_otsu(channel)  # type: ignore[no-untyped-call]
    names = components(channel < threshold)
    span = np.linspace(-1.0, 1.0, len(channel))
    near = np.exp(-(span[:, None] ** 2 + span**2) / 0.25)
    weights = np.bincount(names.ravel(), near.ravel())
    weights[0] = 0.0
    piece = filled((names == weights.argmax()) & (names > 0))
    whole = Image.fromarray(piece.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    found: Mask = np.asarray(whole) > 0.5
    return found


def clutter_figures(
    segmenter: Segmenter, pixels: Pixels, truth: NDArray[np.bool_], before: Floats, seed: int
) -> dict[str, Any]:
    """Mean IoU under each kind of clutter, the points lost, and how many outlines are doubted.

    What a dark field hides of the lesion is not asked for.
    """
    found = {}
    for kind in KINDS:
        drawn, seen = zip(
            *(
                _under(CLUTTER[kind], image, lesion, (seed, i), field="field" in kind)
                for i, (image, lesion) in enumerate(zip(pixels, truth, strict=True))
            ),
            strict=True,
        )
        scored = score(segmenter, np.stack(drawn), np.stack(seen))
        found[kind] = {
            "mean_iou": rounded(scored.iou.mean()),
            "lost": rounded(before.mean() - scored.iou.mean()),
            "passed": rounded((scored.iou >= FAILED).mean()),
            "doubted": rounded(scored.doubted().mean()),
        }
    return found


def _under(
    compose: Callable[[Image.Image, np.random.Generator], Image.Image],
    pixels: Pixels,
    lesion: Mask,
    seed: tuple[int, int],
    *,
    field: bool,
) -> tuple[Pixels, Mask]:
    image = Image.fromarray(pixels)
    drawn = np.asarray(compose(image, np.random.default_rng(seed)))
    if not field:
        return drawn, lesion
    white = compose(Image.new("RGB", image.size, (255, 255, 255)), np.random.default_rng(seed))
    return drawn, lesion & (np.asarray(white).min(2) > 127)


def doubt_figures(scored: Scored, truth: NDArray[np.bool_]) -> dict[str, Any]:
    """How often each doubt is raised, what the sure outlines are like, and whether doubts find what failed."""
    failed, doubted = scored.iou < FAILED, scored.doubted()
    cut = touching(truth)
    flagged = scored.doubted(OutlineDoubt.TOUCHES_FRAME)
    return {
        "doubted": rounded(doubted.mean()),
        "by_doubt": {doubt.value: rounded(scored.doubted(doubt).mean()) for doubt in OutlineDoubt},
        "sure_mean_iou": rounded(scored.iou[~doubted].mean()),
        "sure_passed": rounded((~failed[~doubted]).mean()),
        "failed_found": rounded(doubted[failed].mean()) if failed.any() else None,
        "confidence_finds_failed_auc": rounded(area_under_curve(-scored.confidence, failed)),
        "cut_by_frame": int(cut.sum()),
        "cut_found": rounded(flagged[cut].mean()) if cut.any() else None,
        "whole_called_cut": rounded(flagged[~cut].mean()),
    }


def touching(truth: NDArray[np.bool_], share: float = 0.01) -> NDArray[np.bool_]:
    """Which of N lesions take more than this share of the frame's edge, as the expert drew them."""
    edges = (truth[:, 0], truth[:, -1], truth[:, 1:-1, 0], truth[:, 1:-1, -1])
    taken: NDArray[np.bool_] = np.concatenate(edges, axis=1).mean(1) > share
    return taken


def evaluate(
    segmenter: Segmenter, rows: Sequence[LabelledImage], pixels: Pixels, truth: NDArray[np.bool_], seed: int
) -> dict[str, Any]:
    """All figures of N rows, their pixels and lesions."""
    scored = score(segmenter, pixels, truth)
    lesions = [row.lesion for row in rows]
    otsu = np.array([overlap(blue_otsu(image), t) for image, t in zip(pixels, truth, strict=True)])
    labels = np.array([row.label for row in rows])
    picked = np.unique(np.linspace(0, len(rows) - 1, min(CLUTTERED, len(rows))).astype(np.int64))
    return {
        "all": iou_figures(scored.iou, lesions, seed),
        "blue_otsu": iou_figures(otsu, lesions, seed),
        "diagnoses": {
            diagnosis.value: {
                "images": int((labels == i).sum()),
                "mean_iou": rounded(scored.iou[labels == i].mean()),
                "passed": rounded((scored.iou[labels == i] >= FAILED).mean()),
            }
            for i, diagnosis in enumerate(TRAINED)
            if (labels == i).any()
        },
        "doubts": doubt_figures(scored, truth),
        "clutter": clutter_figures(segmenter, pixels[picked], truth[picked], scored.iou[picked], seed)
        | {"images": len(picked)},
        "milliseconds": time_outlines(segmenter, pixels[:TIMED]),
    }


def time_outlines(segmenter: Segmenter, pixels: Pixels) -> dict[str, Any]:
    """Processor time of an outline from decoded pixels of 600 by 450, one thread, median and 95th percentile."""
    images = [np.asarray(Image.fromarray(image).resize((600, 450))) for image in pixels]
    segmenter.outline(images[0])
    took = []
    for image in images:
        started = time.thread_time()
        segmenter.outline(image)
        took.append(1e3 * (time.thread_time() - started))
    median, high = np.quantile(took, (0.5, 0.95))
    return {"images": len(images), "median": round(float(median), 1), "p95": round(float(high), 1)}
