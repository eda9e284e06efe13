"""Benchmarks behind scripts/benchmark.py: what is timed, and how."""
