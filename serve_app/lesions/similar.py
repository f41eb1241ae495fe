"""The use case: the confirmed cases nearest to an image that has been assessed, without assessing it anew.

Nothing is concluded from them and nothing is stored: they may be limited in any way.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from uuid import UUID

from serve_app.domain.assessment import Neighbours, Outcome, ReferenceFilter
from serve_app.domain.errors import AssessmentPending, NoEmbedding, NotFound, ReferencesDropped, StageFailed
from serve_app.lesions.assess import Stages
from serve_app.lesions.triage import DEADLINE_S
from serve_app.records.lesions import LesionStore
from serve_app.records.references import ReferenceStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Searcher:
    """Searches with the embeddings on record; they are patients' data, so access is decided before."""

    stages: Stages
    records: LesionStore
    references: ReferenceStore

    async def search(
        self, lesion_id: UUID, image_id: UUID, *, k: int, reference_filter: ReferenceFilter
    ) -> tuple[str, Neighbours]:
        """Find the space that an image was assessed in, and the K references there that are most similar.

        NotFound when the lesion has no such image, Erased when it had; AssessmentPending, or NoEmbedding
        where its assessment left none; ReferencesDropped when nothing is left of the space that it was
        assessed in. StageFailed when the search takes longer than an upload may; Overloaded, RecordsUnavailable.
        """
        image = await self.records.image_embedding(lesion_id, image_id)
        if image is None:
            raise NotFound
        if image.outcome is Outcome.PENDING:
            raise AssessmentPending
        if image.embedding is None or image.embedding_space is None:
            raise NoEmbedding
        space = image.embedding_space
        try:
            async with asyncio.timeout(DEADLINE_S):
                neighbours = await self.stages.nearest(image.embedding, space, k, reference_filter)
        except TimeoutError as error:
            raise StageFailed("The search took too long; try again.") from error
        # Asked afterwards, and only where it matters: a space may be dropped while it is searched.
        if not neighbours.similar and not await self.references.count(space):
            raise ReferencesDropped
        return space, neighbours
