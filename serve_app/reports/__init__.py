"""What the whole of the answers says: aggregates, and whether the images are still like the site's first."""
