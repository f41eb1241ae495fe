"""What a benchmark says where the images that it needs are not there."""

from __future__ import annotations

from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["serving", "embedding", "audit", "drift", "change"])
@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty one"])
def test_without_images_it_names_the_folder_and_exits_with_2(
    tmp_path,
    monkeypatch,
    capsys,
    name: str,
    there: bool,  # noqa: FBT001
) -> None:
    folder = tmp_path / "data"
    if there:
        for part in ("images", "uploads"):
            (folder / part).mkdir(parents=True)
    monkeypatch.setenv("DERM_ISIC_DIR", str(folder))
    monkeypatch.setattr("sys.argv", [f"benchmarks.{name}"])
    benchmark = import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert str(folder) in said
