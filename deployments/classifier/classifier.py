"""The classifier: the models it was asked for last, each loaded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deployments.canary import Off, require_right, worst
from deployments.classifier.calibration import Calibrator
from model_store.canary import Canary, read_canary
from model_store.registry import MODELS_IN_MEMORY, Loaded, ModelStore, StoredModel
from model_store.session import Device, InferenceSession
from serve_app.domain.assessment import Classification
from serve_app.records.serving import LiveModel


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
    canary: Canary | None

    def classify(self, batch: Sequence[NDArray[np.uint8]]) -> list[ClassifierOutput]:
        outputs = self.session.run(np.stack(batch))
        return [
            ClassifierOutput(self.stored.manifest.model_id, self.stored.digest, classification, features)
            for classification, features in zip(
                self.calibrator.classify(outputs), outputs.bottleneck, strict=True
            )
        ]

    def prove(self) -> Off:
        if self.canary is None:
            return None
        (answer,) = self.classify([self.canary.pixels])
        return self.canary.answer_off(answer.classification, answer.bottleneck)


class Classifier:
    """Runs prepared pixels through a model. Safe to call from several threads."""

    def __init__(self, store: ModelStore, *, threads: int = 1, device: Device = "cpu") -> None:
        self._store = store
        self._threads = threads
        self._device: Device = device
        self._loaded: Loaded[str, _LoadedModel] = Loaded(self._build, limit=MODELS_IN_MEMORY)

    def __contains__(self, model_id: str) -> bool:
        """Whether a model is loaded, so that `classify` begins at once."""
        return model_id in self._loaded

    def load(self, model_id: str) -> None:
        """Verify a model, make its session and put its canary to it, unless that is done already.

        Raises ModelContractError when it must not be loaded.
        """
        self._loaded.get(model_id)

    def warm(self, models: Iterable[LiveModel]) -> dict[str, str]:
        """Load these models and keep them until others are named; returns their digests by id.

        Raises ModelContractError when one must not be loaded.
        """
        wanted = [model.model_id for model in models]
        self._loaded.hold(wanted)
        return {model_id: self._loaded.get(model_id).stored.digest for model_id in wanted}

    def classify(self, model_id: str, batch: Sequence[NDArray[np.uint8]]) -> list[ClassifierOutput]:
        """Classify N images, each uint8 H×W×3 at the model's input size, in one forward pass."""
        return self._loaded.get(model_id).classify(batch)

    def prove(self) -> Off:
        """Put its canary to each model that is held: how far the worst answer is off; None: none has one."""
        return worst(self._loaded.get(model_id).prove() for model_id in self._loaded.held)

    def _build(self, model_id: str) -> _LoadedModel:
        stored = self._store.open(model_id)
        session = InferenceSession(stored, threads=self._threads, device=self._device)
        loaded = _LoadedModel(stored, session, Calibrator.from_model(stored), read_canary(stored))
        require_right(model_id, loaded.prove)
        return loaded
