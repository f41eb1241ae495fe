"""The figures of a model on images it never saw: one module a kind of figure. None opens an image file."""
