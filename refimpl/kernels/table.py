"""The kernels' columns beside ``reference`` in the table of implementations."""

from __future__ import annotations

from ..ops import REFERENCE
from ..ops.table import Op
from .cross_entropy import cross_entropy
from .embedding import embedding
from .grpo import grpo
from .launch import Launch
from .linear import linear_backward, linear_forward
from .log_prob import log_prob
from .moe import moe
from .rms_norm import rms_norm
from .rope import rope
from .router import router
from .swiglu import swiglu

__all__ = ["COLUMNS", "CUDA", "cuda_table"]

CUDA = {
    "embedding": embedding, "rms_norm": rms_norm, "swiglu": swiglu, "rope": rope, "router": router,
    "cross_entropy": cross_entropy, "log_prob": log_prob, "moe": moe, "grpo": grpo,
}  # fmt: skip
"""What makes each op that has kernels from a `Launch`."""


def cuda_table(launch: Launch) -> dict[str, Op]:
    """The reference's table with every op that CUDA C does in its place; an op without kernels stays the reference."""
    kernels = {name: make(launch) for name, make in CUDA.items()}
    return REFERENCE | {"linear": Op(linear_forward, linear_backward)} | kernels


COLUMNS = {"cuda": cuda_table}
"""By the name that ``--implementation`` takes, what makes the table from a `Launch`."""
