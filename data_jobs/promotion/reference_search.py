"""Similar cases from a model's own bundle: the search of the service without its database."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.load import ReferenceBundle
from serve_app.domain.assessment import Neighbours, SimilarCase
from serve_app.domain.diagnosis import MALIGNANT


class ReferenceSearch:
    """Exact cosine search over a bundle; `ReferenceStore.nearest` is its twin in the database."""

    def __init__(self, bundle: ReferenceBundle) -> None:
        self._images = bundle.images
        self._embeddings = bundle.embeddings
        lesions = [image.lesion_id or image.isic_id for image in bundle.images]
        # Numbers for lesions: comparing 4,000 strings for every case takes longer than the model.
        self._numbers = {lesion: i for i, lesion in enumerate(dict.fromkeys(lesions))}
        self._lesion = np.array([self._numbers[lesion] for lesion in lesions], dtype=np.int64)
        self._malignant = np.array([image.diagnosis in MALIGNANT for image in bundle.images])

    def nearest(self, embedding: NDArray[np.float32], *, k: int, lesion: str) -> Neighbours:
        """Find the K references most similar to a unit vector (512), one a lesion, none of `lesion`."""
        similarity = self._embeddings @ embedding
        order = np.argsort(-similarity, kind="stable")
        order = order[self._lesion[order] != self._numbers.get(lesion, -1)]
        _, firsts = np.unique(self._lesion[order], return_index=True)
        distinct = order[np.sort(firsts)]
        cases = [self._case(int(i), float(similarity[i])) for i in distinct[:k]]
        malignant = distinct[self._malignant[distinct]][:1]
        benign = distinct[~self._malignant[distinct]][:1]
        return Neighbours(
            similar=tuple(cases),
            malignant_share=sum(c.diagnosis in MALIGNANT for c in cases) / len(cases) if cases else None,
            nearest_benign=next((self._case(int(i), float(similarity[i])) for i in benign), None),
            nearest_malignant=next((self._case(int(i), float(similarity[i])) for i in malignant), None),
        )

    def _case(self, index: int, similarity: float) -> SimilarCase:
        image = self._images[index]
        return SimilarCase(
            isic_id=image.isic_id,
            lesion_id=image.lesion_id,
            diagnosis=image.diagnosis,
            diagnosis_confirm_type=image.diagnosis_confirm_type,
            similarity=similarity,
            age_approx=image.age_approx,
            sex=image.sex,
            anatom_site_general=image.anatom_site_general,
            copyright_license=image.copyright_license,
            attribution=image.attribution,
        )
