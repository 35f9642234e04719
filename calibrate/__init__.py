"""Bit allocation for a model: moments of its queries and keys, widths, tables. No sglang import."""

RECENT = 32  # last tokens of a request that a server reads exactly where nothing else is said
MOST_RECENT = 64  # of these
