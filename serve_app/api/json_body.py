"""A small JSON body, read within a bound and after the caller is known.

FastAPI reads a declared body first and asks who is calling afterwards: whoever has no token could
send one without end.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from serve_app.api.admission import Place
from serve_app.api.services import Services
from serve_app.domain.errors import InvalidField, TooLarge
from serve_app.domain.strict_json import KeySentTwice, read_json

Form = TypeVar("Form", bound=BaseModel)

MAX_BYTES = 16 * 1024


async def read_form(request: Request, form: type[Form]) -> Form:
    """Read a body of this form; TooLarge above 16 KiB, InvalidField for anything else that is no such form.

    BodyTimeout as Place.read says.
    """
    body = bytearray()
    services: Services = request.app.state.services
    try:
        async for chunk in Place(MAX_BYTES, services.admission.pace).read(request):
            body += chunk
            if len(body) > MAX_BYTES:
                raise TooLarge(f"The body may have {MAX_BYTES} bytes.")
    except ClientDisconnect as error:
        raise InvalidField("The body broke off.") from error
    try:
        value = read_json(bytes(body))
    except KeySentTwice as twice:
        raise InvalidField(f"{twice}: sent twice.") from twice
    except ValueError:
        raise InvalidField("The body is not valid JSON.") from None
    try:
        return form.model_validate(value)
    except ValidationError as error:
        # Locations and rules only: the offending value may be patient data.
        faults = "; ".join(f"{_place(fault['loc'])}: {fault['msg']}" for fault in error.errors())
        raise InvalidField(faults) from None


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "body"


def body_of(form: type[BaseModel]) -> dict[str, Any]:
    """Describe the body for the OpenAPI document."""
    return {"required": True, "content": {"application/json": {"schema": form.model_json_schema()}}}
