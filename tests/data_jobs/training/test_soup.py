"""A soup is what its share says, and only of one network."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch", reason="needs the train extra")
soup = pytest.importorskip("data_jobs.training.soup", reason="needs the train extra")


def state(value: float, counter: int = 1) -> dict[str, torch.Tensor]:
    return {"module.w": torch.full((2, 3), value), "n_averaged": torch.tensor(counter)}


def test_a_share_lies_between_its_two_ends() -> None:
    mixed = soup.mix(state(1.0), state(3.0, 9), 0.25)
    assert torch.equal(mixed["module.w"], torch.full((2, 3), 1.5))
    assert mixed["n_averaged"] == 9
    assert torch.equal(soup.mix(state(1.0), state(3.0), 0.0)["module.w"], state(1.0)["module.w"])
    assert torch.equal(soup.mix(state(1.0), state(3.0), 1.0)["module.w"], state(3.0)["module.w"])


def test_other_networks_and_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="not of one network"):
        soup.mix(state(1.0), {"module.w": torch.zeros(4)}, 0.5)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        soup.mix(state(1.0), state(2.0), 1.5)


def test_what_is_written_is_what_export_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for name, value in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "checkpoint.pt")
        torch.save({"ema": state(value), "network": {}}, paths[-1])
    output = tmp_path / "soup.pt"
    monkeypatch.setattr("sys.argv", ["soup", *map(str, paths), "--share", "0.5", "--output", str(output)])
    soup.main()
    assert torch.equal(soup.read_averaged(output)["module.w"], torch.full((2, 3), 1.5))
