"""Whole answers of real servers: tool calls, JSON, long texts, quotes, and what a reference thinks of their tokens."""
