"""`steerserve fit` makes artifacts from text files."""
