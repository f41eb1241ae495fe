"""Risk policies on disk, and what `user_config` changes in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
import hashlib
import json
from pathlib import Path
import tomllib
from typing import Any

from deployments.risk.policy import RiskPolicy
from deployments.risk.strict_table import PolicyError, merge_tables, read_table

POLICIES = Path(__file__).resolve().parent / "policies"
CURRENT_VERSION = "2026-11.4"
#: What some policies are older than, with values that ask nothing; they have answered, and are never edited.
_LATER_LIMITS = {"min_colour": 0.0, "max_two_levels": 1.0, "max_damaged": 1.0}
_LATER = {
    "quality": {"hard": _LATER_LIMITS, "soft": _LATER_LIMITS},
    "review": {"same_lesion": 0.0, "same_lesion_if_lower": 0.0},
}
_OLDER_VERSIONS = frozenset({"2026-11.2", "2026-11.3"})


def read_policy(version: str = CURRENT_VERSION, *, folder: Path = POLICIES) -> RiskPolicy:
    """Read `folder/<version>.toml`.

    Raises PolicyError, naming the key, for one that is missing, unknown or of the wrong kind.
    """
    path = folder / f"{version}.toml"
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError as error:
        raise PolicyError(f"There is no risk policy {path}.") from error
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{path} is not TOML: {error}.") from error
    policy = read_table(RiskPolicy, merge_tables(_LATER, raw) if version in _OLDER_VERSIONS else raw)
    if policy.version != version:
        raise PolicyError(f"{path} calls itself {policy.version!r}.")
    return policy


def with_overrides(policy: RiskPolicy, overrides: Mapping[str, Any]) -> RiskPolicy:
    """Change some keys, nested as in the file: `{"review": {"min_margin": 0.15}}`.

    The version then ends in `+` and 8 hex digits over everything the policy holds, so that
    an answer names exactly the numbers that made it: the same numbers, the same version.
    Nothing changed, the version stays. Raises PolicyError for an unknown key, a wrong value,
    or a policy that contradicts itself or a guideline.
    """
    if "version" in overrides:
        raise PolicyError("version cannot be overridden.")
    shipped = _plain(policy)
    changed = _plain(read_table(RiskPolicy, merge_tables(shipped, overrides)))
    if changed == shipped:
        return policy
    del changed["version"]
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    version = f"{policy.version.partition('+')[0]}+{digest}"
    return read_table(RiskPolicy, {**changed, "version": version})


def _plain(policy: RiskPolicy) -> dict[str, Any]:
    """As TOML would give it: strings, numbers, lists and tables."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(policy)))
    return plain
