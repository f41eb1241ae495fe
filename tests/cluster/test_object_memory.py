"""Where Ray's objects may go, and what happens where there is no memory for them."""

from __future__ import annotations

from pathlib import Path
import stat

import pytest

from cluster import ray_node
from cluster.ray_node import SHARED, RayFailed, RayNode, empty, has_room, is_memory, on_disk
from cluster.safety import Finding, prevents_ready

MOUNTS = {"/": "ext4", "/dev/shm": "tmpfs", "/dev/shm/disk": "xfs", "/run": "tmpfs", "/over": "overlay"}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/dev/shm", "memory"),
        ("/dev/shm/derm-0-1", "memory"),
        ("/dev/shm/disk/derm", "disk"),
        ("/run/x", "memory"),
        ("/runner", "disk"),
        ("/over/tmp", "disk"),
        ("/", "disk"),
    ],
)
def test_a_file_system_is_memory_or_a_disk(path: str, kind: str) -> None:
    assert is_memory(Path(path), MOUNTS) is (kind == "memory")


def test_a_link_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to("/dev/shm")
    assert is_memory(tmp_path / "linked" / "x", {str(tmp_path): "ext4", "/dev/shm": "tmpfs"})


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose file systems are all on disks."""
    monkeypatch.setattr(ray_node, "_MEMORY", frozenset())


@pytest.mark.usefixtures("no_memory")
def test_a_raylet_that_puts_objects_on_a_disk_is_found(tmp_path: Path) -> None:
    command = ["raylet", f"--plasma_directory={tmp_path}", "--fallback_directory=/", "--other=/var"]
    assert on_disk(command) == [Path("/"), tmp_path]
    finding = Finding("object_memory", "")
    assert prevents_ready(finding, env="production")
    assert not prevents_ready(finding, env="development")


@pytest.mark.usefixtures("no_memory")
def test_production_does_not_start_without_memory_for_images(tmp_path: Path, monkeypatch) -> None:
    assert not has_room(SHARED, 1)
    monkeypatch.setenv("DERM_ENV", "production")
    with pytest.raises(RayFailed, match=r"in clear on a disk.*300 MB free.*--shm-size"):
        RayNode(tmp_path).start()
    assert not (tmp_path / "spill").exists()
    RayNode(tmp_path).directory.rmdir()


def test_more_than_the_memory_has_is_no_room() -> None:
    assert not has_room(SHARED, 1 << 60)
    assert not has_room(SHARED / "no such folder", 1)


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    if not has_room(SHARED, 150_000_000):
        pytest.skip("this machine has no room in /dev/shm")
    node = RayNode(tmp_path)
    node.objects.mkdir(mode=0o755)
    try:
        with pytest.raises(RayFailed, match="not this user's alone"):
            node.start()
    finally:
        node.objects.rmdir()
        node.directory.rmdir()


def test_a_stop_leaves_no_object(tmp_path: Path) -> None:
    node = RayNode(tmp_path, memory=tmp_path)
    for folder in (node.objects, tmp_path / "spill"):
        (folder / "ray_spilled_objects_1").mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)
        (folder / "ray_spilled_objects_1" / "object").write_bytes(b"an image")
    node.stop()
    assert not node.objects.exists()
    assert list((tmp_path / "spill").iterdir()) == []


def test_what_an_emptied_folder_links_to_stays(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(kept)
    (folder / "file").touch(mode=stat.S_IRUSR)
    empty(folder)
    empty(tmp_path / "none")
    assert list(folder.iterdir()) == []
    assert (kept / "file").exists()
