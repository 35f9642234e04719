"""Rows whose heads have any widths and several scales: ``paper`` and ``product`` by RoPE blocks, and odd budgets.

Nothing here is fast: each code is looked up by itself, and the layout is data. Rows in columns never come here.
"""
