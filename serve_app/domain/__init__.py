"""The vocabulary: frozen types, which are also what is kept and what is answered, and errors. Numpy and pydantic only."""
