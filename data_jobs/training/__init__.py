"""From labelled images to a model folder. The only package of this project that imports torch."""

import model_store  # noqa: F401 - it switches ONNX Runtime's telemetry off, before that is imported
