"""Long-context benchmarks: what each asks, how it scores, and runs that can be resumed."""
