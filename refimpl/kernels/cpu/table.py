"""The column's table: the reference with every op that has kernels for a CPU in its place."""

from __future__ import annotations

from ...ops import REFERENCE, Op, Ops
from .attention import attention_backward, attention_forward
from .balance_loss import balance_loss_backward, balance_loss_forward
from .compile import numba
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .embedding import embedding_backward, embedding_forward
from .ffn import ffn_backward, ffn_forward
from .head_cross_entropy import head_cross_entropy_backward, head_cross_entropy_forward
from .linear import linear_backward, linear_forward
from .log_prob import log_prob_backward, log_prob_forward
from .mla import mla_backward, mla_forward
from .moe import moe_backward, moe_forward
from .rms_norm import rms_norm_backward, rms_norm_forward
from .rope import rope_backward, rope_forward
from .router import router_backward, router_forward
from .swiglu import swiglu_backward, swiglu_forward

__all__ = ["numba_cpu_table"]


def numba_cpu_table() -> Ops:
    """CouldNotRun without Numba or threadpoolctl."""
    numba()
    return REFERENCE | {
        "embedding": Op(embedding_forward, embedding_backward),
        "linear": Op(linear_forward, linear_backward),
        "rms_norm": Op(rms_norm_forward, rms_norm_backward),
        "swiglu": Op(swiglu_forward, swiglu_backward),
        "rope": Op(rope_forward, rope_backward),
        "router": Op(router_forward, router_backward),
        "balance_loss": Op(balance_loss_forward, balance_loss_backward),
        "attention": Op(attention_forward, attention_backward),
        "cross_entropy": Op(cross_entropy_forward, cross_entropy_backward),
        "log_prob": Op(log_prob_forward, log_prob_backward),
        "head_cross_entropy": Op(head_cross_entropy_forward, head_cross_entropy_backward),
        "mla": Op(mla_forward, mla_backward),
        "ffn": Op(ffn_forward, ffn_backward),
        "moe": Op(moe_forward, moe_backward),
    }
