"""The table of implementations: each op's name, and the pair of functions that does it.

The composite ops (`ffn`, `mla`, `mla_absorbed`, `moe`, `head_cross_entropy`, `mtp`) and the model
find the ops they are made of in such a table, so that a faster implementation plugs in by name and
no op or model is touched:

    ops = REFERENCE | {"attention": Op(flash_attention_forward, flash_attention_backward)}
    mla_forward(..., ops=ops)

The ops themselves never choose. `LEAVES` are the ops made of no others; `refimpl.ops.REFERENCE`
adds the composites, which the model looks up in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .attention import attention_backward, attention_forward
from .balance_loss import balance_loss_backward, balance_loss_forward
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .embedding import embedding_backward, embedding_forward
from .grpo import grpo_backward, grpo_forward
from .linear import linear_backward, linear_forward
from .log_prob import log_prob_backward, log_prob_forward
from .preference_loss import preference_loss_backward, preference_loss_forward
from .rms_norm import rms_norm_backward, rms_norm_forward
from .rope import rope_backward, rope_forward
from .router import router_backward, router_forward
from .swiglu import swiglu_backward, swiglu_forward

__all__ = ["LEAVES", "Op", "Ops"]


class Op(NamedTuple):
    forward: Callable[..., Any]  # (differentiable…, *, not differentiable…) -> (y, saved)
    backward: Callable[
        ..., Any
    ]  # (dy, saved) -> gradients, one for each positional argument of forward


Ops = Mapping[str, Op]

LEAVES: dict[str, Op] = {
    "linear": Op(linear_forward, linear_backward),
    "embedding": Op(embedding_forward, embedding_backward),
    "rms_norm": Op(rms_norm_forward, rms_norm_backward),
    "swiglu": Op(swiglu_forward, swiglu_backward),
    "rope": Op(rope_forward, rope_backward),
    "attention": Op(attention_forward, attention_backward),
    "router": Op(router_forward, router_backward),
    "balance_loss": Op(balance_loss_forward, balance_loss_backward),
    "cross_entropy": Op(cross_entropy_forward, cross_entropy_backward),
    "log_prob": Op(log_prob_forward, log_prob_backward),
    "grpo": Op(grpo_forward, grpo_backward),
    "preference_loss": Op(preference_loss_forward, preference_loss_backward),
}
