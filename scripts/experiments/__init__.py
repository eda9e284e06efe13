"""Experiments: the same examples under several settings, answered, recorded, compared, reported."""
