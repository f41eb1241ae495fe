"""The classifier: every model it has been asked for, loaded once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import threading

import numpy as np
from numpy.typing import NDArray

from deployments.classifier.calibration import Calibrator
from model_store.registry import ModelStore, StoredModel
from model_store.session import Device, InferenceSession
from serve_app.domain.assessment import Classification


@dataclass(frozen=True, slots=True)
class ClassifierOutput:
    """One image's answer, and its bottleneck (float32, 512) for the embedder."""

    model_id: str
    model_digest: str
    classification: Classification
    bottleneck: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _LoadedModel:
    stored: StoredModel
    session: InferenceSession
    calibrator: Calibrator


class Classifier:
    """Runs prepared pixels through a model. Safe to call from several threads."""

    def __init__(self, store: ModelStore, *, threads: int = 1, device: Device = "cpu") -> None:
        self._store = store
        self._threads = threads
        self._device: Device = device
        self._loaded: dict[str, _LoadedModel] = {}
        self._lock = threading.Lock()

    def load(self, model_id: str) -> None:
        """Verify a model and make its session, unless that is done already.

        Raises ModelContractError when it must not be loaded.
        """
        self._model(model_id)

    def classify(self, model_id: str, batch: Sequence[NDArray[np.uint8]]) -> list[ClassifierOutput]:
        """Classify N images, each uint8 H×W×3 at the model's input size, in one forward pass."""
        model = self._model(model_id)
        logits, bottleneck = model.session.run(np.stack(batch))
        return [
            ClassifierOutput(model_id, model.stored.digest, classification, features)
            for classification, features in zip(
                model.calibrator.classify(logits, bottleneck), bottleneck, strict=True
            )
        ]

    def _model(self, model_id: str) -> _LoadedModel:
        with self._lock:
            if model_id not in self._loaded:
                stored = self._store.open(model_id)
                self._loaded[model_id] = _LoadedModel(
                    stored,
                    InferenceSession(stored, threads=self._threads, device=self._device),
                    Calibrator.from_model(stored),
                )
            return self._loaded[model_id]
