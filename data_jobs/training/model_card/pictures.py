"""The file names of the card's pictures, in the model folder beside it."""

from __future__ import annotations

CONFUSION_NAME = "confusion.png"
RELIABILITY_NAME = "reliability.png"
MELANOMA_NAME = "melanoma.png"
