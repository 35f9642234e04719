"""Decode attention, encoding and their bf16 and fp8 peers on one GPU: what ``kernels_*.csv`` holds.

Every method reads the same random tokens through the same index, inside a CUDA graph, with data that the
L2 cache has not kept. A method is timed only after its output agreed with a float32 reference.
"""
