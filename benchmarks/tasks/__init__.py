"""Downstream tasks through the OpenAI API of a real server; see docs/tasks.md."""
