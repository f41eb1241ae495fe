"""One error tree; each error carries its HTTP status and a stable problem code, its base's where it names none.

A class's docstring is its default message, and is what a caller reads.
"""

from __future__ import annotations

from typing import ClassVar


class DermError(Exception):
    """The service could not do this."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    #: Seconds; a subclass states its own.
    retry_after_s: int | None = None

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (self.__doc__ or "").strip())

    def __reduce__(self) -> tuple[type[DermError], tuple[str]]:
        # Errors cross process boundaries between stages; subclasses take one message.
        return type(self), (str(self),)


class Unauthenticated(DermError):
    """A valid bearer token is required."""

    status = 401
    code = "unauthenticated"


class Forbidden(DermError):
    """You may not do this for this patient."""

    status = 403
    code = "forbidden"


class NotFound(DermError):
    """There is nothing here by that id."""

    status = 404
    code = "not_found"


class Conflict(DermError):
    """The request conflicts with what is stored."""

    status = 409
    code = "conflict"


class LegalHold(Conflict):
    """A legal hold is in force on this image: it cannot be erased until the hold is released."""

    code = "legal_hold"


class AssessmentPending(Conflict):
    """The assessment has not finished; ask again when it has."""

    code = "assessment_pending"
    retry_after_s = 5


class NoEmbedding(Conflict):
    """The image was refused or could not be assessed, so it has no embedding to search with."""

    code = "no_embedding"


class ReferencesDropped(Conflict):
    """The references of the space that the image was assessed in are gone; a new image can be compared."""

    code = "references_dropped"


class Erased(DermError):
    """The image was erased and cannot be brought back; its receipt is on record."""

    status = 410
    code = "erased"


class RejectedUpload(DermError):
    """The upload was rejected; nothing was stored."""

    status = 422
    code = "rejected_upload"


class BodyTimeout(RejectedUpload):
    """The body came too slowly; nothing was stored, send it again."""

    status = 408
    code = "body_timeout"


class TooLarge(RejectedUpload):
    """The image is larger than this service accepts."""

    status = 413
    code = "too_large"


class UnsupportedImage(RejectedUpload):
    """The content is neither JPEG nor PNG."""

    status = 415
    code = "unsupported_image"


class UndecodableImage(RejectedUpload):
    """The image is broken or truncated and cannot be decoded."""

    code = "undecodable_image"


class ImageTooSmall(RejectedUpload):
    """The image's short side is below the minimum."""

    code = "image_too_small"


class InvalidField(RejectedUpload):
    """A field has a value this service does not know."""

    code = "invalid_field"


class WrongEncounter(RejectedUpload):
    """encounter_id: the patient's record has no such encounter of this patient. Check both ids."""

    code = "wrong_encounter"


class IdempotencyMismatch(DermError):
    """This Idempotency-Key was used with a different request."""

    status = 422
    code = "idempotency_mismatch"


class RateLimited(DermError):
    """Too many requests; wait as long as Retry-After says."""

    status = 429
    code = "rate_limited"
    retry_after_s = 1

    def __init__(self, message: str = "", *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(DermError):
    """The service is at its capacity; nothing was stored, try again."""

    status = 503
    code = "overloaded"
    retry_after_s = 2


class RecordsUnavailable(DermError):
    """The clinical record cannot be reached; nothing was stored, try again."""

    status = 503
    code = "records_unavailable"
    retry_after_s = 5


class KeyProviderUnavailable(RecordsUnavailable):
    """The key provider cannot be reached; nothing was stored, try again."""

    code = "key_provider_unavailable"


class DataKeyMissing(DermError):
    """This node's key store does not hold the data key of this image. The node that holds it, or its backup, must be put back."""

    status = 503
    code = "data_key_missing"
    retry_after_s = 60


class IssuerKeysUnavailable(DermError):
    """The keys of the token issuer cannot be had, so no token can be checked; try again."""

    status = 503
    code = "issuer_keys_unavailable"
    retry_after_s = 5


class DirectoryUnavailable(DermError):
    """The directory of patients did not answer; its message is a code that says how."""

    status = 503
    code = "directory_unavailable"


class PmsUnavailable(DermError):
    """The PMS gave no usable answer; its message is a code that says how, and never about whom."""

    status = 503
    code = "pms_unavailable"


class PmsRefused(PmsUnavailable):
    """The PMS will not take a message for what it says; its message is a code that says how."""

    code = "pms_refused"


class StageFailed(DermError):
    """A stage of the assessment did not answer."""

    status = 503
    code = "stage_failed"
    retry_after_s = 2


class IntegrityError(DermError):
    """Stored data did not authenticate; it may have been altered."""

    code = "integrity"


class InvalidSetting(DermError):
    """A setting of this node cannot be used."""

    code = "invalid_setting"


class ModelContractError(DermError):
    """The model folder does not keep its contract and must not be loaded."""

    code = "model_contract"
