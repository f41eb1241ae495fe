"""What changed on a lesion between two images."""
