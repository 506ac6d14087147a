"""What a GPU is asked when one can be had for minutes: ``python -m benchmarks.gpu --help``."""
