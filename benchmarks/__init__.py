"""Measurements whose results are kept under ``benchmarks/results``. Run from the repository root; not installed."""
