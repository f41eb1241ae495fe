"""GET /api/references/{isic_id}/image: a confirmed case to look at beside the patient's lesion.

Public, licensed images of the archive: no patient of ours, so every role may see them, and a look at one
is not in the audit log; a refusal is.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Header, Path, Request
from fastapi.responses import Response

from serve_app.api.answers import archive_url
from serve_app.api.authentication import Caller
from serve_app.api.openapi import PROBLEM_RESPONSES
from serve_app.api.rules import rule
from serve_app.api.services import Services
from serve_app.domain.errors import NotFound
from serve_app.records.reference_pictures import find_picture
from serve_app.security.access import Action

router = APIRouter(tags=["references"], responses=PROBLEM_RESPONSES)

#: Where each licence of the archive is written down.
LICENCE_TEXTS = {
    "CC-0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-NC": "https://creativecommons.org/licenses/by-nc/4.0/",
}


@router.get(
    "/api/references/{isic_id}/image",
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
    request: Request,
    _: Caller,
    isic_id: Annotated[str, Path(max_length=40)],
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Answer with the picture that was made when the reference was embedded; its longer side has 384 px at most.

    404 names the archive's own page where the cache holds the case but no picture of it.
    """
    services: Services = request.app.state.services
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
