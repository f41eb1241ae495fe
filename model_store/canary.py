"""A model's canary: prepared pixels, and what the model must answer to them wherever it runs.

`canary.npz` lies in the model folder and names the model by its digest, so the manifest cannot vouch for
it: a model gets one without becoming another (`python -m data_jobs.training.canary`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import logging
from typing import Any, Self
import zipfile

import numpy as np
from numpy.typing import NDArray

from model_store.registry import StoredModel
from serve_app.domain.assessment import Classification
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.errors import ModelContractError

CANARY_NAME = "canary.npz"

#: What processors may differ in, whose kernels sum in another order. A logit may be off by 0.001, as at an
#: import and in the golden vectors of devices; no probability is then off by more than 0.3 % of itself (two
#: logits, over a temperature of 0.7). docs/models.md has what was measured; a replay keeps 1e-6.
PROBABILITY_OFF = 0.003
#: Of the bottleneck's greatest value.
BOTTLENECK_OFF = 0.001
#: Of a unit vector's component: a product of 512 terms, always on a CPU.
VECTOR_OFF = 1e-5

_LEAST_PROBABILITY = 1e-9
_ANSWER = ("pixels", "nine", "members", "bottleneck")
_SPACE = "space:"
_log = logging.getLogger("derm.canary")


@dataclass(frozen=True, slots=True)
class Canary:
    """Pixels (uint8, H×W×3), and the answer to them.

    nine: probabilities in the order of Diagnosis; members: which of TRAINED are in the prediction set;
    bottleneck: float32, 512; vectors: the unit vector that it becomes, by embedding space.
    """

    pixels: NDArray[np.uint8]
    nine: NDArray[np.float64]
    members: NDArray[np.bool_]
    bottleneck: NDArray[np.float32]
    vectors: Mapping[str, NDArray[np.float32]]

    @classmethod
    def of_answer(
        cls,
        pixels: NDArray[np.uint8],
        answer: Classification,
        bottleneck: NDArray[np.float32],
        vectors: Mapping[str, NDArray[np.float32]],
    ) -> Self:
        """Make one of what a model has answered."""
        return cls(pixels, _nine(answer), _members(answer), bottleneck, vectors)

    def answer_off(self, answer: Classification, bottleneck: NDArray[np.float32]) -> float:
        """How far an answer is off, as a share of what is allowed; infinite for another set or no number."""
        found, expected = (np.maximum(nine, _LEAST_PROBABILITY) for nine in (_nine(answer), self.nine))
        apart = (
            np.abs(np.log(found / expected)).max() / PROBABILITY_OFF,
            np.abs(bottleneck - self.bottleneck).max() / np.abs(self.bottleneck).max() / BOTTLENECK_OFF,
        )
        return _share(*apart) if (_members(answer) == self.members).all() else float("inf")

    def vector_off(self, embedding_space: str, vector: NDArray[np.float32]) -> float:
        """How far an embedding is off, likewise; 0 in a space that the canary does not know."""
        expected = self.vectors.get(embedding_space)
        return 0.0 if expected is None else _share(np.abs(vector - expected).max() / VECTOR_OFF)


def _nine(answer: Classification) -> NDArray[np.float64]:
    return np.array([answer.probabilities[d] for d in Diagnosis])


def _members(answer: Classification) -> NDArray[np.bool_]:
    return np.array([d in answer.prediction_set for d in TRAINED])


def _share(*parts: np.floating) -> float:
    return float(max(parts)) if np.isfinite(parts).all() else float("inf")


def read_canary(model: StoredModel) -> Canary | None:
    """Read a model's canary; None, and a line in the log, when it has none or another model's.

    Raises ModelContractError when the file is damaged.
    """
    path = model.folder / CANARY_NAME
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if str(arrays["model_digest"]) == model.digest:
                vectors = {
                    name.removeprefix(_SPACE): arrays[name] for name in arrays if name.startswith(_SPACE)
                }
                pixels, nine, members, bottleneck = (arrays[name] for name in _ANSWER)
                return Canary(pixels, nine, members, bottleneck, vectors)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelContractError(f"{path} is damaged ({type(error).__name__}): write it anew.") from error
    _log.warning(
        "A model has no canary: what it answers is not checked.", extra={"model_id": model.manifest.model_id}
    )
    return None


def write_canary(model: StoredModel, canary: Canary) -> None:
    """Put a canary into the model's folder, whole or not at all."""
    partial = model.folder / f".{CANARY_NAME}.partial"
    arrays: dict[str, Any] = {name: getattr(canary, name) for name in _ANSWER}
    arrays |= {_SPACE + name: vector for name, vector in canary.vectors.items()}
    with partial.open("wb") as file:
        np.savez_compressed(file, model_digest=np.array(model.digest), **arrays)
    partial.rename(model.folder / CANARY_NAME)
