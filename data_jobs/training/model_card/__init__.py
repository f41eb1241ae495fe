"""The sections of the model card: text around numbers that JSON files hold."""
