"""The annual model update: import a model, compare it with the live one, promote it, roll it back."""
