"""Rows in columns written and read by PyTorch on a CPU, in few and large operations. Definition: :mod:`..reference`."""
