"""The benchmark suite: what `planecycle-fast bench` and `benchmarks/` measure, how, and what they make of it."""
