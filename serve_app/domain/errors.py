"""One error tree; each error carries its HTTP status and a stable problem code, its base's where it names none.

A class's docstring is its default message, and is what a caller reads.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar


class DermError(Exception):
    """The service could not do this."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    #: Seconds.
    retry_after_s: int | None = None

    def __init_subclass__(
        cls, *, status: int | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        """State what is not as in its base."""
        super().__init_subclass__()
        cls.status, cls.code = status or cls.status, code or cls.code
        cls.retry_after_s = retry_after_s or cls.retry_after_s

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (self.__doc__ or "").strip())

    def __reduce__(self) -> tuple[type[DermError], tuple[str]]:
        # Errors cross process boundaries between stages; subclasses take one message.
        return type(self), (str(self),)


class Unauthenticated(DermError, status=401, code="unauthenticated"):
    """A valid bearer token is required."""


class SubjectRefused(Unauthenticated, code="token_subject_refused"):
    """The token's subject (sub) is refused: 1 to 255 visible characters (NFKC), no outer spaces, no name of the service's own."""


class LifetimeRefused(Unauthenticated, code="token_lifetime_refused"):
    """The token is valid for longer than this service allows (DERM_TOKEN_MAX_LIFETIME_S)."""


class TokenReplayed(Unauthenticated, code="token_replayed"):
    """A token with this jti was taken before: each is good for one request."""


class Forbidden(DermError, status=403, code="forbidden"):
    """You may not do this for this patient."""


class NotFound(DermError, status=404, code="not_found"):
    """There is nothing here by that id."""


class Conflict(DermError, status=409, code="conflict"):
    """The request conflicts with what is stored."""


class LegalHold(Conflict, code="legal_hold"):
    """A legal hold is in force on this image: it cannot be erased until the hold is released."""


class AssessmentPending(Conflict, code="assessment_pending", retry_after_s=5):
    """The assessment has not finished; ask again when it has."""


class NoEmbedding(Conflict, code="no_embedding"):
    """The image was refused or could not be assessed, so it has no embedding to search with."""


class ReferencesDropped(Conflict, code="references_dropped"):
    """The references of the space that the image was assessed in are gone; a new image can be compared."""


class Erased(DermError, status=410, code="erased"):
    """The image was erased and cannot be brought back; its receipt is on record."""


class RejectedUpload(DermError, status=422, code="rejected_upload"):
    """The upload was rejected; nothing was stored."""


class BodyTimeout(RejectedUpload, status=408, code="body_timeout"):
    """The body came too slowly; nothing was stored, send it again."""


class TooLarge(RejectedUpload, status=413, code="too_large"):
    """The image is larger than this service accepts."""


class UnsupportedImage(RejectedUpload, status=415, code="unsupported_image"):
    """The content is neither JPEG nor PNG."""


class UndecodableImage(RejectedUpload, code="undecodable_image"):
    """The image is broken or truncated and cannot be decoded."""


class ImageTooSmall(RejectedUpload, code="image_too_small"):
    """The image's short side is below the minimum."""


class InvalidField(RejectedUpload, code="invalid_field"):
    """A field has a value this service does not know."""


class InvalidHookRequest(InvalidField, status=400):
    """The body is no request that this CDS service takes."""


class WrongEncounter(RejectedUpload, code="wrong_encounter"):
    """encounter_id: the patient's record has no such encounter of this patient. Check both ids."""


class IdempotencyMismatch(DermError, status=422, code="idempotency_mismatch"):
    """This Idempotency-Key was used with a different request."""


class RateLimited(DermError, status=429, code="rate_limited", retry_after_s=1):
    """Too many requests; wait as long as Retry-After says."""

    def __init__(self, message: str = "", *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(DermError, status=503, code="overloaded", retry_after_s=2):
    """The service is at its capacity; nothing was stored, try again."""


class RecordsUnavailable(DermError, status=503, code="records_unavailable", retry_after_s=5):
    """The clinical record cannot be reached; nothing was stored, try again."""


class KeyProviderUnavailable(RecordsUnavailable, code="key_provider_unavailable"):
    """The key provider cannot be reached; nothing was stored, try again."""


class DataKeyMissing(DermError, status=503, code="data_key_missing", retry_after_s=60):
    """This node's key store does not hold the data key of this image. The node that holds it, or its backup, must be put back."""


class IssuerKeysUnavailable(DermError, status=503, code="issuer_keys_unavailable", retry_after_s=5):
    """The keys of the token issuer cannot be had, so no token can be checked; try again."""


class DirectoryUnavailable(DermError, status=503, code="directory_unavailable"):
    """The directory of patients did not answer; its message is a code that says how."""


class PmsUnavailable(DermError, status=503, code="pms_unavailable"):
    """The PMS gave no usable answer; its message is a code that says how, and never about whom."""


class PmsRefused(PmsUnavailable, code="pms_refused"):
    """The PMS will not take a message for what it says; its message is a code that says how."""


class Interrupted(DermError, status=502, code="interrupted", retry_after_s=2):
    """The request was interrupted; whether it was carried out is not known. Send it again with the same Idempotency-Key."""


class StageFailed(DermError, status=503, code="stage_failed", retry_after_s=2):
    """A stage of the assessment did not answer."""


class IntegrityError(DermError, code="integrity"):
    """Stored data did not authenticate; it may have been altered."""


class InvalidSetting(DermError, code="invalid_setting"):
    """A setting of this node cannot be used."""


class ModelContractError(DermError, code="model_contract"):
    """The model folder does not keep its contract and must not be loaded."""


def describe_problem(status: int, code: str, detail: str, request_id: str) -> dict[str, object]:
    """Make one problem document (RFC 9457); `code` is stable, `detail` is for people."""
    return {
        "type": f"urn:derm-cds:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": request_id,
    }
