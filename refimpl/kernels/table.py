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

__all__ = ["CUDA", "KERNELS", "NUMBA_CUDA", "cuda_table"]

CUDA = {
    "embedding": embedding, "rms_norm": rms_norm, "swiglu": swiglu, "rope": rope, "router": router,
    "cross_entropy": cross_entropy, "log_prob": log_prob, "moe": moe, "grpo": grpo,
}  # fmt: skip
"""What makes each op that has kernels in CUDA C from a `Launch`."""

NUMBA_CUDA = {name: CUDA[name] for name in ("rms_norm", "swiglu", "rope", "router", "cross_entropy", "log_prob", "moe")}
"""Those of them that have kernels in Numba CUDA too; the host side is the same."""

KERNELS = {"cuda": CUDA, "numba_cuda": NUMBA_CUDA}


def cuda_table(launch: Launch) -> dict[str, Op]:
    """The reference's table with every op in its place that the launch's language has; the others stay the reference's."""
    kernels = {name: make(launch) for name, make in KERNELS[launch.language].items()}
    return REFERENCE | {"linear": Op(linear_forward, linear_backward)} | kernels
