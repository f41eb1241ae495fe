"""Reading what a request sends: JSON bodies, the upload of an image, cursors; bounded, in memory, every field checked.

How much may be under way in one process is bounded, too, and how long a body may take. What is refused for it has
cost nothing and is stored nowhere; what is let in fits in memory and is answered while the caller still waits.

FastAPI reads a declared body first and asks who is calling afterwards: whoever has no token could
send one without end.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from fastapi import Request
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import BodyTimeout, InvalidField, Overloaded, TooLarge
from serve_app.domain.identifiers import parse_opaque_id
from serve_app.domain.patient import (
    AnatomSite,
    BodyPosition,
    BodyView,
    Checklist,
    ClinicalContext,
    History,
    Sex,
    SkinType,
)
from serve_app.domain.review import Impression, Referral
from serve_app.domain.strict_json import KeySentTwice, read_json
from serve_app.logs import conceal
from serve_app.settings import Settings

if TYPE_CHECKING:  # they hold the AdmissionGate
    from serve_app.http.services import Services

#: How long a body may take whatever its pace, and keeps its place whoever else needs it, seconds.
GRACE_S = 5.0


class Place:
    """What one request holds: memory for its body, and while that is being read, only as long as it comes on."""

    def __init__(self, size: int, settings: Settings) -> None:
        self.size = size
        self._settings = settings
        self._since: float | None = None
        self._wait: asyncio.Timeout | None = None
        self._cut_off = False

    async def read(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Yield the body as it comes; BodyTimeout when it comes too slowly, or slowly and its place is needed."""
        clock, stream, received = asyncio.get_running_loop().time, request.stream(), 0
        self._since = since = clock()
        try:
            while not self._cut_off:
                at_pace = GRACE_S + received / self._settings.body_min_bytes_per_s
                allowed = min(self._settings.body_timeout_s, at_pace)
                async with asyncio.timeout_at(since + allowed) as self._wait:
                    chunk = await anext(stream, None)
                self._wait = None
                if chunk is None:
                    return
                received += len(chunk)
                yield chunk
        except TimeoutError as error:
            raise BodyTimeout from error
        finally:
            self._since = self._wait = None
        raise BodyTimeout

    def is_slow(self) -> bool:
        """Whether its body has been coming for longer than GRACE_S."""
        return self._since is not None and asyncio.get_running_loop().time() - self._since > GRACE_S

    def cut_off(self) -> None:
        """End the reading of its body."""
        self._cut_off = True
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(0.0)


@dataclass(slots=True)
class AdmissionGate:
    """Counts uploads under way, and what their bodies hold together."""

    settings: Settings
    #: Oldest first.
    _places: list[Place] = field(default_factory=list, init=False)

    @contextmanager
    def enter(self, body_bytes: int) -> Iterator[Place]:
        """Hold a place for one upload of this size, or raise Overloaded.

        A body of unknown length counts as the largest allowed. One upload always fits. Where it is full, those
        whose bodies trickle give way, the oldest first: a crowd that sends half of its bodies stops nobody.
        """
        kept = self._places.copy()
        slow = [place for place in kept if place.is_slow()]
        while not self._fits(kept, body_bytes):
            if not slow:
                raise Overloaded
            kept.remove(slow.pop(0))
        for place in set(self._places) - set(kept):
            place.cut_off()
        self._places = [*kept, place := Place(body_bytes, self.settings)]
        try:
            yield place
        finally:
            if place in self._places:
                self._places.remove(place)

    def _fits(self, places: list[Place], body_bytes: int) -> bool:
        room = self.settings.max_upload_bytes_in_flight - sum(place.size for place in places)
        return len(places) < self.settings.max_uploads_in_flight and (not places or body_bytes <= room)


#: Of a JSON body.
MAX_BYTES = 16 * 1024


_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
#: What a person writes, in lines of any system. NUL and other control characters are not text to PostgreSQL, nor to who
#: reads it.
TEXT = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$"


def check_idempotency_key(key: str | None) -> None:
    """Raise InvalidField for what is no Idempotency-Key; None is no key."""
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidField("Idempotency-Key: 1 to 255 visible ASCII characters.")


class Form(BaseModel):
    """A JSON body that holds nothing but its fields."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


AnyForm = TypeVar("AnyForm", bound=BaseModel)


async def read_form(request: Request, form: type[AnyForm], *, limit: int = MAX_BYTES) -> AnyForm:
    """Read a body of this form; TooLarge above `limit` bytes, InvalidField for anything else that is no such form.

    BodyTimeout as Place.read says.
    """
    services: Services = request.app.state.services
    chunks = Place(limit, services.settings).read(request)
    try:
        body = b"".join(
            [chunk async for chunk in _bounded(chunks, limit, f"The body may have {limit} bytes.")]
        )
        value = read_json(body)
        if not isinstance(value, dict):
            raise InvalidField("body: Input should be an object")
        return form.model_validate(value)
    except ClientDisconnect as error:
        raise InvalidField("The body broke off.") from error
    except KeySentTwice as twice:
        raise InvalidField(f"{twice}: sent twice.") from twice
    except ValidationError as error:
        # Locations and rules only: the offending value may be patient data.
        faults = [(".".join(map(str, fault["loc"])) or "body", fault["msg"]) for fault in error.errors()]
        raise InvalidField("; ".join(f"{place}: {rule}" for place, rule in faults)) from None
    except ValueError:
        raise InvalidField("The body is not valid JSON.") from None


def body_of(form: type[BaseModel]) -> dict[str, Any]:
    """Describe the body for the OpenAPI document."""
    schema = form.model_json_schema()
    described = _written_out(schema, schema.pop("$defs", {}))
    return {"required": True, "content": {"application/json": {"schema": described}}}


def _written_out(part: Any, shapes: dict[str, Any]) -> Any:  # noqa: ANN401
    """A schema with each of its own shapes in its place: a reference would be looked up in the whole document."""
    if isinstance(part, list):
        return [_written_out(each, shapes) for each in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _written_out(shapes[part["$ref"].rpartition("/")[2]], shapes)
    return {name: _written_out(each, shapes) for name, each in part.items()}


def write_cursor(*last: object) -> str:
    """Write where a page ended: what its last entry is sorted by."""
    words = [each.isoformat() if isinstance(each, date) else str(each) for each in last]
    return base64.urlsafe_b64encode("|".join(words).encode()).decode()


def read_cursor(cursor: str, *kinds: Callable[[str], Any]) -> tuple[Any, ...]:
    """Read the values of a cursor, each of its kind; InvalidField for one that was not written here."""
    try:
        words = base64.urlsafe_b64decode(cursor.encode()).decode().split("|")
        return tuple(kind(word) for kind, word in zip(kinds, words, strict=True))
    except (ValueError, OverflowError) as error:
        raise InvalidField("cursor: not a cursor of this service.") from error


def read_moment(text: str) -> datetime:
    """Read a time; one without a zone would compare with none in the database."""
    return datetime.fromisoformat(text).astimezone(UTC)


#: Room for the other fields and the multipart framing, bytes.
_FRAMING = 256 * 1024
_MAX_FIELD_BYTES = 64 * 1024
_MAX_AGE = 120
_DEVICE = re.compile(r"[!-~]([ -~]{0,62}[!-~])?")
_SHARE = re.compile(r"0(\.[0-9]{1,4})?|1(\.0{1,4})?")
_IMPRESSION = TypeAdapter(Impression)

_FIELDS = frozenset(
    {
        *("image", "patient_id", "encounter_id", "lesion_id", "anatom_site_general"),
        *("age_approx", "sex", "history", "checklist", "skin_type", "device", "view", "x", "y", "impression"),
    }
)

Answers = TypeVar("Answers", History, Checklist)


@dataclass(frozen=True, slots=True)
class UploadForm:
    """The fields of one upload as they were sent; the image is its bytes."""

    image: bytes
    patient_id: str
    values: dict[str, str]

    def fingerprint(self, *extra: str) -> bytes:
        """SHA-256 over everything that may change the answer, whatever the multipart boundary."""
        digest = hashlib.sha256(hashlib.sha256(self.image).digest())
        digest.update(json.dumps([sorted(self.values.items()), extra]).encode())
        return digest.digest()


async def read_upload(request: Request, place: Place, *, max_image_bytes: int) -> UploadForm:
    """Read a multipart body of one image and its fields.

    Raises TooLarge as soon as the body outgrows the limit, BodyTimeout as Place.read says,
    InvalidField for a body that is not such a form.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidField("The body must be multipart/form-data.")
    limit, declared = max_image_bytes + _FRAMING, _declared_bytes(request)
    if declared is not None and declared > limit:
        raise TooLarge(f"The body has {declared} bytes; the image may have {max_image_bytes}.")
    parser = MultiPartParser(
        request.headers,
        _bounded(place.read(request), limit, f"The body is larger than {limit} bytes."),
        # As many as there are fields: what is wrong with a second one is said by name.
        max_files=len(_FIELDS),
        max_fields=len(_FIELDS),
        max_part_size=_MAX_FIELD_BYTES,
    )
    parser.spool_max_size = limit + 1
    try:
        return await _to_upload(await parser.parse())
    except ClientDisconnect as error:
        raise InvalidField("The body broke off.") from error
    except (MultiPartException, ValueError, LookupError) as error:
        # ValueError and LookupError: a charset that the caller made up.
        raise InvalidField("The multipart body is malformed.") from error
    finally:
        for file in parser._files_to_close_on_error:  # noqa: SLF001 - of parts that a body breaks off in, too
            file.close()


def expected_bytes(request: Request, *, max_image_bytes: int) -> int:
    """How much memory the body may take: its declared length, or the limit if that is less or unknown."""
    limit, declared = max_image_bytes + _FRAMING, _declared_bytes(request)
    return limit if declared is None else min(declared, limit)


def _declared_bytes(request: Request) -> int | None:
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isascii() and declared.isdigit() and len(declared) <= 15 else None


async def _bounded(stream: AsyncIterator[bytes], limit: int, message: str) -> AsyncGenerator[bytes, None]:
    received = 0
    async for chunk in stream:
        received += len(chunk)
        if received > limit:
            raise TooLarge(message)
        yield chunk


async def _to_upload(form: FormData) -> UploadForm:
    sent = form.multi_items()
    for name, value in sent:
        conceal(None if name in _FIELDS else name, value.filename if isinstance(value, UploadFile) else value)
    names = [name for name, _ in sent]
    if unknown := set(names) - _FIELDS:
        raise InvalidField(f"Unknown field: {', '.join(sorted(unknown))[:200]}.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidField(f"{twice}: sent twice.")
    image = form.get("image")
    if not isinstance(image, UploadFile):
        raise InvalidField("image: a file is required.")
    values = {name: value for name, value in sent if isinstance(value, str)}
    if file := next((name for name in names if name not in {"image", *values}), None):
        raise InvalidField(f"{file}: a file was sent where text is expected.")
    patient_id = parse_opaque_id("patient_id", values.get("patient_id", ""))
    return UploadForm(await image.read(), patient_id, values)


def parse_lesion_id(value: str) -> UUID:
    """Parse one of our own ids."""
    try:
        return UUID(value)
    except ValueError as error:
        raise InvalidField("lesion_id: not an id of this service.") from error


def parse_context(values: dict[str, str]) -> ClinicalContext:
    """Read the clinical fields. An empty value counts as not stated. Raises InvalidField."""
    site = values.get("anatom_site_general")
    age = values.get("age_approx")
    sex = values.get("sex")
    if site and site not in set(AnatomSite):
        raise InvalidField(f"anatom_site_general: must be one of {', '.join(AnatomSite)}.")
    if sex and sex not in set(Sex):
        raise InvalidField(f"sex: must be one of {', '.join(Sex)}.")
    if age and not (age.isascii() and age.isdigit() and len(age) <= 3 and int(age) <= _MAX_AGE):
        raise InvalidField(f"age_approx: must be a whole number of years, 0 to {_MAX_AGE}.")
    skin_type, device = values.get("skin_type"), values.get("device")
    if skin_type and skin_type not in set(SkinType):
        raise InvalidField(f"skin_type: must be one of {', '.join(SkinType)} (Fitzpatrick).")
    if device and not _DEVICE.fullmatch(device):
        raise InvalidField("device: 1 to 64 visible ASCII characters, with spaces only between them.")
    return ClinicalContext(
        anatom_site_general=AnatomSite(site) if site else None,
        age_approx=int(age) if age else None,
        sex=Sex(sex) if sex else None,
        history=_parse_answers("history", values.get("history"), History) or History(),
        checklist=_parse_answers("checklist", values.get("checklist"), Checklist),
        skin_type=SkinType(skin_type) if skin_type else None,
        device=device or None,
        position=_parse_position(values),
    )


def _parse_position(values: dict[str, str]) -> BodyPosition | None:
    """Read where on the body the lesion is: all three fields, or none."""
    view, x, y = sent = [values.get(name, "") for name in ("view", "x", "y")]
    if not any(sent):
        return None
    if view not in set(BodyView):
        raise InvalidField(f"view: required with x and y, and must be one of {', '.join(BodyView)}.")
    if not (_SHARE.fullmatch(x) and _SHARE.fullmatch(y)):
        raise InvalidField("x, y: both are required with view, 0 to 1 with four decimals at the most.")
    return BodyPosition(BodyView(view), float(x), float(y))


def parse_impression(text: str | None) -> Impression | None:
    """Read a clinician's own impression; an empty value, or one that says nothing, is none. Raises InvalidField."""
    if not text:
        return None
    try:
        given = _IMPRESSION.validate_python(read_json(text))
    except KeySentTwice as twice:
        raise InvalidField(f"impression: {twice}: sent twice.") from twice
    except ValueError:
        # Whether it is no JSON or none of these words, and without the value: it may be patient data.
        raise InvalidField(
            "impression: a JSON object that may hold diagnosis"
            f" ({', '.join(Diagnosis)}) and intended_referral ({', '.join(Referral)})."
        ) from None
    return given if given != Impression() else None


def _parse_answers(name: str, text: str | None, kind: type[Answers]) -> Answers | None:
    """Read a JSON object of yes/no answers; null is an answer that was not given."""
    if not text:
        return None
    try:
        answers = read_json(text)
    except KeySentTwice as twice:
        raise InvalidField(f"{name}: {twice}: sent twice.") from twice
    except ValueError as error:
        raise InvalidField(f"{name}: not valid JSON.") from error
    known = {item.name for item in fields(kind)}
    may_hold = f"it may hold {', '.join(sorted(known))}"
    if not isinstance(answers, dict):
        raise InvalidField(f"{name}: not an object; {may_hold}.")
    if unknown := set(answers) - known:
        raise InvalidField(f"{name}: unknown {', '.join(sorted(unknown))[:200]}; {may_hold}.")
    if any(value is not None and not isinstance(value, bool) for value in answers.values()):
        raise InvalidField(f"{name}: every answer must be true, false or null.")
    return kind(**{key: value for key, value in answers.items() if value is not None})
