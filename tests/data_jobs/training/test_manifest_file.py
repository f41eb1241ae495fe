from __future__ import annotations

import tomllib

from data_jobs.training.manifest_file import dump_toml


def test_what_is_written_reads_back() -> None:
    content = {
        "model_id": 'a "quoted" name é',
        "flag": True,
        "input": {"input_size": [3, 160, 160], "mean": [0.5, 0.25, 1e-07]},
        "spaces": [{"embedding_space": "m.white1", "count": 0}, {"embedding_space": "m.lda1", "count": 2}],
        "operating_points": {"melanoma": {"diagnoses": ["MEL"], "threshold": 0.012345}},
        "files": {"model.onnx": {"bytes": 1, "sha256": "00"}},
    }
    assert tomllib.loads(dump_toml(content)) == content
