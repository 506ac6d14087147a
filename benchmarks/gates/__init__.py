"""What the compiled kernels cost, read from their machine code: `python -m benchmarks.gates`. Needs no GPU."""
