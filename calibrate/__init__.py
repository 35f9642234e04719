"""Bit allocation for a model: moments of its queries and keys, widths, tables. No sglang import."""
