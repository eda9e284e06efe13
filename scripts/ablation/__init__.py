"""Ablations of the method: grids, records, statistics, pictures."""
