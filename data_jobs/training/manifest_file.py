"""Writing of `manifest.toml`: the inverse of `model_store.manifest.read_manifest`."""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path
import tomllib
from typing import Any

from model_store.integrity import digest_file, verify_files
from model_store.manifest import MANIFEST_NAME, Manifest, read_manifest


def write_manifest(folder: Path, content: Mapping[str, Any]) -> Manifest:
    """Write `content` with the digests of all files of the folder, and read it back.

    `content` is the manifest as plain tables, `files` left out. Raises ModelContractError when
    what was written does not load.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST_NAME
    }
    partial = folder / f".{MANIFEST_NAME}.partial"
    partial.write_text(dump_toml({**content, "files": files}), encoding="utf-8")
    partial.rename(folder / MANIFEST_NAME)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    return manifest


def seal(folder: Path, *, references: int | None = None) -> Manifest:
    """Write the digests anew after files of the folder changed; `references` is the new count."""
    with (folder / MANIFEST_NAME).open("rb") as file:
        content = tomllib.load(file)
    content.pop("files")
    if references is not None:
        content["spaces"][0]["count"] = references
    return write_manifest(folder, content)


def dump_toml(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """TOML of nested tables of strings, numbers, booleans, flat lists and lists of tables."""
    plain = [f"{_key(k)} = {_value(v)}\n" for k, v in content.items() if not _is_table(v)]
    tables = []
    for key, value in content.items():
        inner = (*path, key)
        name = ".".join(_key(part) for part in inner)
        if isinstance(value, Mapping):
            tables.append(f"\n[{name}]\n" + dump_toml(value, inner))
        elif _is_table(value):
            tables.extend(f"\n[[{name}]]\n" + dump_toml(row, inner) for row in value)
    return "".join(plain + tables)


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)
    )


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else json.dumps(name)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)
