"""From labelled images to a model folder. The only package of this project that imports torch."""
