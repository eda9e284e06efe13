"""Long-context benchmarks: how to read their files, what to ask, and how to score answers."""
