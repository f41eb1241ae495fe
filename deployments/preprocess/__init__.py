"""From uploaded bytes to pixels at the model's input size, with quality measures."""
