"""The one way in which importing, promoting or rolling back says no."""

from __future__ import annotations

from serve_app.domain.errors import DermError


class PromotionRefused(DermError):
    """The model that answers stays as it is."""

    code = "promotion_refused"


class ImportRefused(DermError):
    """The model was not imported; nothing was left in the store."""

    code = "import_refused"
