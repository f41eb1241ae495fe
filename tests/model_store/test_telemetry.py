"""Nothing leaves the premises: ONNX Runtime's telemetry is off before it can begin."""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

_RUN = """
import data_jobs.training.scan
from pathlib import Path
import sys
import numpy as np
from model_store.registry import ModelStore
from model_store.session import InferenceSession
store = ModelStore(Path(sys.argv[1]))
model = store.open(sys.argv[2])
side = model.manifest.input.input_size[1]
InferenceSession(model, threads=1).run(np.zeros((1, side, side, 3), np.uint8))
"""


def test_a_session_leaves_nothing_in_the_home_folder(tmp_path: Path, models: Path, model_id: str) -> None:
    """Whichever module comes first, a job's, too."""
    home = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME")}
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-B", "-c", _RUN, str(models), model_id]
    subprocess.run(command, env=kept | home, check=True, cwd=Path(__file__).parents[2])
    assert list(tmp_path.rglob("*")) == []
