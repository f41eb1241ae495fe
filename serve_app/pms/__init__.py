"""The patient management system: the directory of patients, and the way to it."""
