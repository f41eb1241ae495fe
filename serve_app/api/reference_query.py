"""How a request limits its search for references: the query parameters that routes share."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query

from serve_app.domain.patient import AnatomSite

Licence = Literal["CC-0", "CC-BY", "CC-BY-NC"]
#: What a reference can be of: the trained eight, for UNK is no diagnosis of anybody's.
ReferenceDiagnosis = Literal["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"]

TopK = Annotated[int, Query(ge=1, le=50)]
Licences = Annotated[list[Licence] | None, Query(description="Only references under these licences.")]
Diagnoses = Annotated[
    list[ReferenceDiagnosis] | None, Query(description="Only references of these diagnoses.")
]
Sites = Annotated[
    list[AnatomSite] | None,
    Query(description="Only references at these sites; one whose site the archive does not say is at none."),
]
Confirmed = Annotated[
    bool, Query(description="Only references of which the archive says how the diagnosis was confirmed.")
]
