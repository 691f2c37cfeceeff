"""How good a model is: bits per byte, answers, benchmarks."""
