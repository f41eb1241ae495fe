"""An ensemble: networks that each left out a fold, and the one graph of them all.

An ensemble is a TOML file that names its members' recipes, the folds they left out and their weights by SHA-256; a
recipe of one network is an ensemble of one. The graph gives `member_logits` N×M×8, `logits` N×8 (their mean) and a
`bottleneck` N×512: of one network its own, of several the 512 principal components of theirs side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
import tomllib

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.dataset import LabelledImage, fold_indices, training_indices
from data_jobs.training.recipe import AcceptancePlan, Recipe, read_acceptance, read_recipe


@dataclass(frozen=True, slots=True)
class Ensemble:
    """One model of M networks: a recipe a member, with the fold that it left out, and the SHA-256 of its weights.

    `side` is the input side of them all; None where an export chooses it (one network).
    """

    architecture: str
    tag: str
    seed: int
    members: tuple[Recipe, ...]
    acceptance: AcceptancePlan | None = None
    side: int | None = None
    weights_sha256: tuple[str, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Ensemble:
        """The ensemble of one network."""
        return cls(recipe.architecture, recipe.tag, recipe.seed, (recipe,), recipe.acceptance)

    @property
    def model_id(self) -> str:
        """`architecture.tag`, the name of the model everywhere else."""
        return f"{self.architecture}.{self.tag}"

    def member_of(self, rows: list[LabelledImage]) -> NDArray[np.int64]:
        """For every row the member that left its fold out, or -1: whose answer to it is out of fold."""
        folds = {member.data.fitted_fold: k for k, member in enumerate(self.members)}
        return np.array([folds.get(row.fold, -1) for row in rows], dtype=np.int64)

    def unseen(self, rows: list[LabelledImage]) -> NDArray[np.int64]:
        """Rows of the folds left out that no member has seen, as the service's mean has to be judged on."""
        left_out = fold_indices(rows, [member.data.fitted_fold for member in self.members])
        seen: set[int] = set()
        for member in self.members:
            seen.update(training_indices(rows, member.data).tolist())
            if member.start is not None:
                seen.update(fold_indices(rows, member.start.seen_folds).tolist())
        return np.array([i for i in left_out.tolist() if i not in seen], dtype=np.int64)


def read_ensemble(path: Path) -> Ensemble:
    """Read an ensemble, or a recipe as an ensemble of one. ValueError as `read_recipe`, and for another shape."""
    with path.open("rb") as file:
        raw = tomllib.load(file)
    if "members" not in raw:
        return Ensemble.of(read_recipe(path))
    try:
        parts = [
            (read_recipe(path.parent / part["recipe"]).member(part["left_out"]), part["weights_sha256"])
            for part in raw["members"]
        ]
        acceptance = read_acceptance(raw["acceptance"]) if "acceptance" in raw else None
        ensemble = Ensemble(
            raw["architecture"],
            raw["tag"],
            raw["seed"],
            tuple(recipe for recipe, _ in parts),
            acceptance,
            raw["side"],
            tuple(digest for _, digest in parts),
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing.") from error
    if len({member.data.left_out for member in ensemble.members}) < len(parts):
        raise ValueError(f"{path}: two members left out one fold.")
    if len({member.data.interpolation for member in ensemble.members}) > 1:
        raise ValueError(f"{path}: the members prepare their images differently.")
    return ensemble
