"""A server under agent sessions for some minutes, with every answer read again: python -m benchmarks.soak."""
