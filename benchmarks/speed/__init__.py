"""How fast a step is, beside other ways to train the same adapter: `python -m benchmarks.speed`."""
