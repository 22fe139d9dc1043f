"""One file per op: ``X_forward(differentiable…, *, not_differentiable…) -> (y, saved)`` and
``X_backward(dy, saved) -> gradients``, one gradient for each positional argument."""

from .attention import attention_backward, attention_forward
from .balance_loss import balance_loss_backward, balance_loss_forward
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .embedding import embedding_backward, embedding_forward
from .ffn import ffn_backward, ffn_forward
from .flash_attention import flash_attention_backward, flash_attention_forward
from .grpo import GRPO_PRESETS, GRPOOutput, group_advantages, grpo_backward, grpo_forward
from .head_cross_entropy import head_cross_entropy_backward, head_cross_entropy_forward
from .leaves import LEAVES, AnyOp, Leaves, Op, Table
from .linear import linear_backward, linear_forward
from .log_prob import log_prob_backward, log_prob_forward
from .mla import MLAOutput, mla_backward, mla_forward
from .mla_absorbed import mla_absorbed_backward, mla_absorbed_forward
from .moe import NETWORKS, Networks, moe_backward, moe_forward
from .mtp import mtp_backward, mtp_forward, mtp_pairs
from .preference_loss import preference_loss_backward, preference_loss_forward
from .reference import IMPLEMENTATIONS, REFERENCE, Ops
from .rms_norm import rms_norm_backward, rms_norm_forward
from .rope import (
    Yarn,
    rope_backward,
    rope_forward,
    rope_frequencies,
    yarn_mscale,
    yarn_softmax_factor,
)
from .router import (
    RouterOutput,
    bias_update,
    expert_load,
    router_backward,
    router_forward,
    select_experts,
)
from .swiglu import swiglu_backward, swiglu_forward

__all__ = [
    "AnyOp",
    "GRPOOutput",
    "GRPO_PRESETS",
    "IMPLEMENTATIONS",
    "LEAVES",
    "Leaves",
    "MLAOutput",
    "NETWORKS",
    "Networks",
    "Op",
    "Ops",
    "REFERENCE",
    "RouterOutput",
    "Table",
    "Yarn",
    "attention_backward",
    "attention_forward",
    "balance_loss_backward",
    "balance_loss_forward",
    "bias_update",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "embedding_backward",
    "embedding_forward",
    "expert_load",
    "ffn_backward",
    "ffn_forward",
    "flash_attention_backward",
    "flash_attention_forward",
    "group_advantages",
    "grpo_backward",
    "grpo_forward",
    "head_cross_entropy_backward",
    "head_cross_entropy_forward",
    "linear_backward",
    "linear_forward",
    "log_prob_backward",
    "log_prob_forward",
    "mla_absorbed_backward",
    "mla_absorbed_forward",
    "mla_backward",
    "mla_forward",
    "moe_backward",
    "moe_forward",
    "mtp_backward",
    "mtp_forward",
    "mtp_pairs",
    "preference_loss_backward",
    "preference_loss_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope_backward",
    "rope_forward",
    "rope_frequencies",
    "router_backward",
    "router_forward",
    "select_experts",
    "swiglu_backward",
    "swiglu_forward",
    "yarn_mscale",
    "yarn_softmax_factor",
]
