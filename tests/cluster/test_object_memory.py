"""Where Ray's objects may go, and what happens where there is no memory for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import ray_node
from cluster.ray_node import SHARED, RayFailed, RayNode, has_room, is_memory, on_disk

MOUNTS = {"/": "ext4", "/dev/shm": "tmpfs", "/dev/shm/disk": "xfs", "/run": "tmpfs", "/over": "overlay"}


@pytest.mark.parametrize(
    ("path", "memory"),
    [
        ("/dev/shm/derm-0-1", True),
        ("/run/x", True),
        ("/dev/shm/disk/derm", False),
        ("/runner", False),
        ("/over/tmp", False),
        ("/", False),
    ],
)
def test_a_file_system_is_memory_or_a_disk(path: str, memory: bool) -> None:  # noqa: FBT001
    assert is_memory(Path(path), MOUNTS) is memory


def test_a_link_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to("/dev/shm")
    assert is_memory(tmp_path / "linked" / "x", {str(tmp_path): "ext4", "/dev/shm": "tmpfs"})


def test_without_memory_a_raylet_is_found_and_production_does_not_start(tmp_path: Path, monkeypatch) -> None:
    """A machine whose file systems are all on disks."""
    monkeypatch.setattr(ray_node, "_MEMORY", frozenset())
    command = ["raylet", f"--plasma_directory={tmp_path}", "--fallback_directory=/", "--other=/var"]
    assert on_disk(command) == [Path("/"), tmp_path]
    assert not has_room(SHARED)
    monkeypatch.setenv("DERM_ENV", "production")
    with pytest.raises(RayFailed, match=r"in clear on a disk.*300 MB free.*--shm-size"):
        RayNode(tmp_path).start()
    assert not (tmp_path / "spill").exists()
    RayNode(tmp_path).directory.rmdir()


def test_more_than_the_memory_has_is_no_room(monkeypatch) -> None:
    assert not has_room(SHARED / "no such folder")
    monkeypatch.setattr(ray_node, "_ROOM", 1 << 60)
    assert not has_room(SHARED)


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    if not has_room(SHARED):
        pytest.skip("this machine has no room in /dev/shm")
    node = RayNode(tmp_path)
    node.objects.mkdir(mode=0o755)
    try:
        with pytest.raises(RayFailed, match="not this user's alone"):
            node.start()
    finally:
        node.objects.rmdir()
        node.directory.rmdir()


def test_a_stop_leaves_no_object_and_what_links_lead_to(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ray_node, "SHARED", tmp_path)
    node = RayNode(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    for folder in (node.objects, tmp_path / "spill"):
        (folder / "ray_spilled_objects_1").mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)
        (folder / "ray_spilled_objects_1" / "object").write_bytes(b"an image")
        (folder / "link").symlink_to(tmp_path / "kept")
        (folder / "file").touch()
    node.stop()
    assert not node.objects.exists()
    assert list((tmp_path / "spill").iterdir()) == []
    assert (tmp_path / "kept" / "file").exists()
