"""The segmenter: a small network that outlines the lesion, its training, export and evidence."""
