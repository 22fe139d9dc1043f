"""Is a port right? Its tensors beside the truth, part by part: a verdict, and the name of the
mistake.

Read truth.py (what a port is held against) and parts.py (in which order) first.
"""

from __future__ import annotations
