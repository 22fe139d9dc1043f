"""DeepSeek-V3/R1 in NumPy and CuPy: every gradient derived by hand and checked.

``refimpl.ops`` holds one file an op, ``refimpl.model`` the whole model made of them,
``refimpl.check`` the gradient checker. Importing any of them needs NumPy alone.
"""

__version__ = "0.1.0"
