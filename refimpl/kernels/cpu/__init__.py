"""The column ``numba_cpu``: ops on one or more CPU cores, as fast as this machine's products allow.

`table` puts it together. NumPy makes the products of all tokens by a matrix, kernels compiled by
Numba (``kernels/*_numba_cpu.py``) the rest, with the products of experts and heads, and `pool`
gives blocks of rows, heads and experts to threads.
"""
