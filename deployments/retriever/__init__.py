"""The nearest confirmed reference cases, in the space the query was embedded in."""
