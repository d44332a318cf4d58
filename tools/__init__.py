"""Single-process programs, and benchmarks."""
