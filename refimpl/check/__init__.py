"""The gradient checker, for any pair of functions, ours or yours:

    from refimpl.check import check
    report = check(my_forward, my_backward, (x, w), {"eps": 0.1})
    print(report)          # one row per tensor
    assert report.ok

``my_forward(x, w, eps=0.1)`` returns (y, saved) and ``my_backward(dy, saved)`` returns a gradient
for x and one for w. The rules are explained in derivations/README.md, "How a gradient is checked",
and `refimpl.check.rules`.
"""

from __future__ import annotations

from .checker import (
    FD_TOLERANCE,
    MODEL_FD_TOLERANCE,
    MODEL_VALIDITY,
    RULES,
    VALIDITY,
    Report,
    TensorResult,
    check,
)
from .rules import Pair, finite_difference, full_jacobian, has_longdouble

__all__ = [
    "FD_TOLERANCE",
    "MODEL_FD_TOLERANCE",
    "MODEL_VALIDITY",
    "Pair",
    "RULES",
    "Report",
    "TensorResult",
    "VALIDITY",
    "check",
    "finite_difference",
    "full_jacobian",
    "has_longdouble",
]
