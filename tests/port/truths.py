"""Truths to diagnose against, and ports that hold them: right ones, and ones with a planted bug."""

from __future__ import annotations

ACTIVATIONS = "*"
