"""Puts into a wheel what a checkout has beside its packages: the graph's figures, and which commit it is."""  # noqa: INP001 - a script

from __future__ import annotations

from pathlib import Path
import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CheckoutHook(BuildHookInterface):  # type: ignore[type-arg]
    """A wheel has no checkout; an editable install has, and asks that."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add graphs/serve_config.yaml (cluster/deploy.py), and serve_app/commit.txt where the commit is known."""
        sys.path.insert(0, self.root)
        from serve_app.version import find_commit  # noqa: PLC0415 - only now can it be found

        commit = find_commit(Path(self.root))
        if version != "standard":
            return
        build_data["force_include"][str(Path(self.root) / "serve_config.yaml")] = "graphs/serve_config.yaml"
        if commit:
            path = Path(self.directory) / "commit.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{commit}\n", encoding="utf-8")
            build_data["force_include"][str(path)] = "serve_app/commit.txt"
