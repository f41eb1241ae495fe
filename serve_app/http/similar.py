"""The references: how a search may be limited, another search with an assessed image, and a reference's picture."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query
from fastapi.responses import JSONResponse, Response

from serve_app.access.rules import Action
from serve_app.domain.assessment import ReferenceFilter
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Conflict, Erased, NotFound, StageFailed
from serve_app.domain.patient import AnatomSite
from serve_app.http.access import Caller, permit_lesion, rule
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES
from serve_app.http.services import Parts
from serve_app.records.answers import (
    NeighboursDocument,
    Similar,
    SimilarCasesDocument,
    archive_url,
    references_of,
)
from serve_app.records.references import find_picture

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


router = APIRouter(responses=PROBLEM_RESPONSES)

#: What the audit log says of this beside `read`; not what was asked for: which diagnosis is thought of says something
#: of the patient.
_SEARCH = {"search": "similar"}


@router.get(
    "/api/lesions/{lesion_id}/images/{image_id}/similar",
    tags=["lesions"],
    response_model=SimilarCasesDocument,
    openapi_extra=rule(Action.READ),
    summary="The confirmed cases most similar to an image",
)
async def find_similar(
    requested: Caller,
    services: Parts,
    lesion_id: UUID,
    image_id: UUID,
    *,
    top_k: TopK = 10,
    licence: Licences = None,
    diagnosis: Diagnoses = None,
    anatom_site_general: Sites = None,
    confirmed: Confirmed = False,
) -> JSONResponse:
    """Search again with an assessed image, in the space it was assessed in; its assessment stays as it is."""
    reference_filter = ReferenceFilter(
        # Each once: the caller may repeat a value as often as a URL is long.
        licences=tuple(dict.fromkeys(licence or ())),
        sites=tuple(dict.fromkeys(anatom_site_general or ())),
        confirmed_only=confirmed,
        diagnoses=tuple(dict.fromkeys(map(Diagnosis, diagnosis or ()))),
    )
    await permit_lesion(services, requested, lesion_id)
    requested.image_id = image_id
    try:
        # Searches take places of uploads: a flood of them must not find the retriever before an image does.
        with services.admission.enter(0):
            space, found = await services.searcher.search(
                lesion_id, image_id, k=top_k, reference_filter=reference_filter
            )
    except (NotFound, Erased, Conflict, StageFailed) as failure:
        await services.records.record_event(requested.event("failed", code=failure.code, **_SEARCH))
        raise
    pictured = await services.records.pictured(references_of(found))
    await services.records.record_event(requested.event("success", **_SEARCH))
    document = SimilarCasesDocument(
        lesion_id=lesion_id,
        image_id=image_id,
        embedding_space=space,
        similar=[Similar.of(case, pictured) for case in found.similar],
        neighbours=NeighboursDocument.of(found, pictured),
    )
    return JSONResponse(document.answer(), headers=NO_STORE)


#: Where each licence of the archive is written down.
LICENCE_TEXTS = {
    "CC-0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-NC": "https://creativecommons.org/licenses/by-nc/4.0/",
}


@router.get(
    "/api/references/{isic_id}/image",
    tags=["references"],
    response_class=Response,
    responses={
        200: {
            "content": {"image/jpeg": {}},
            "headers": {
                "Link": {"description": "The licence, rel=license.", "schema": {"type": "string"}},
                "X-Attribution": {
                    "description": "Whom to name, percent-encoded UTF-8.",
                    "schema": {"type": "string"},
                },
            },
        },
        304: {"description": "The caller has this picture."},
    },
    openapi_extra=rule(Action.VIEW_REFERENCE),
    summary="A reference image, small",
)
async def read_reference_image(
    _: Caller,
    services: Parts,
    isic_id: Annotated[str, Path(max_length=40)],
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Answer with the picture that was made when the reference was embedded; its longer side has 384 px at most.

    404 names the archive's own page where the cache holds the case but no picture of it.
    """
    found = await find_picture(services.pool, isic_id)
    if found is None:
        raise NotFound("No reference case has this isic_id.")
    if found.jpeg is None:
        raise NotFound(
            f"The picture of {isic_id} is not in this service's cache; the archive shows it at {archive_url(isic_id)}."
        )
    etag = f'"{found.sha256}"'
    headers = {
        "ETag": etag,
        # An isic_id names one image for good; a browser that is shared keeps it to itself.
        "Cache-Control": "private, max-age=86400",
        "X-Content-Type-Options": "nosniff",
        "X-Attribution": quote(found.attribution),
    }
    if text := LICENCE_TEXTS.get(found.copyright_license):
        headers["Link"] = f'<{text}>; rel="license"'
    if if_none_match is not None and etag in {tag.strip() for tag in if_none_match.split(",")}:
        return Response(status_code=304, headers=headers)
    return Response(found.jpeg, media_type="image/jpeg", headers=headers)
