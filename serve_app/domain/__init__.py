"""The vocabulary: frozen types and errors. Standard library and numpy only."""
