"""Decode attention on integer tensor cores, in CUDA C for Hopper. Definition: reference.decode_attention.

The kernel of ``decode/`` makes float16 of every code; this one looks four up at a time as signed bytes. It has the same
arguments and leaves the same partial results. Where it does not run, ``decode/`` does.

operands.py: how words become operands. source.py, decode.cu, hopper.cu: the kernel's text, of a layout, for all
layouts, and its primitives. compile.py, launch.py: from there to a cubin and a function. attention.py: what decode
calls.
"""
