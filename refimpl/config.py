"""The model's configuration and conventions: frozen records, and presets (`tiny`, `mini`, `v3`,
`v2`, `v2-lite`, …).

Each field names our letter, DeepSeek's name (Hugging Face's config.json) and the paper's symbol
where they differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Literal, get_origin, get_type_hints

from .array import expect_that
from .ops.choices import (
    BlindQuery,
    GroupScore,
    Layout,
    MaskedGroups,
    MTPOrder,
    Ranking,
    Score,
    expect_choice,
)
from .ops.rope import Yarn, check_yarn, yarn_mscale

__all__ = ["CONVENTIONS", "PRESETS", "Conventions", "ModelConfig", "Yarn", "preset"]


def _check_choices(record: object) -> None:
    """ValueError if a field that is a Literal holds anything else."""
    for name, hint in get_type_hints(type(record)).items():
        if get_origin(hint) is Literal:
            expect_choice(name, getattr(record, name), hint)


@dataclass(frozen=True)
class Conventions:
    """Where papers and implementations disagree: one field per choice. The default is `official`:
    DeepSeek's inference code and released weights, and the paper where those are silent.
    derivations/conventions.md alone says who else does what."""

    mtp_order: MTPOrder = "embedding_hidden"
    """In front of MTP's projection: embedding_hidden (released weights) or hidden_embedding
    (paper)."""
    mtp_hidden: Literal["normed", "raw", "raw_first", "normed_first"] = "normed"
    """An MTP module reads the previous depth's state normed (after the final norm, or the previous
    module's own norm) or raw (before it). raw_first, normed_first: module 1 as it says, later ones
    the other."""
    mtp_normaliser: Literal["positions", "valid", "main"] = "positions"
    """MTP's loss is a sum divided by: all B·T positions (paper: 1/T over T−k terms; padding left
    out), valid (its own targets), or main (the main loss's targets)."""
    mtp_zero_first_embedding: bool = False
    """Zero the embedding that MTP reads at RoPE position 0 of a sequence."""
    masked_groups: MaskedGroups = "-inf"
    """Scores of groups left out: -inf, or zero."""
    balance_counts: Literal["unbiased", "routed"] = "unbiased"
    """f_i counts the K best unbiased and ungrouped scores (paper) or the routed experts."""
    bias_centre: bool = False
    """Subtract the mean from the bias update."""
    gate_epsilon: float = 0.0
    """Added to the sum of the chosen scores: 0 (DeepSeek's inference code), or 1e-20 elsewhere."""
    latent_eps: Literal["config", "class_default"] = "config"
    """eps of the two latent norms: the config's, or class_default (1e-6). They differ on
    Moonlight."""
    yarn_when: Literal["beyond_original", "always"] = "beyond_original"
    """YaRN applies only if max_positions exceeds the original context (DeepSeek), or always."""
    yarn_factor: Literal["ratio", "if_both"] = "ratio"
    """What multiplies cos and sin: m(mscale) / m(mscale_all_dim), always, or if both are given,
    else m(1)."""
    softmax_normalise: Literal["scaled", "unscaled", "ignored"] = "scaled"
    """What norm_topk_prob does to a softmax gate: as to a sigmoid one; without routed_scale (V2's
    file); none."""
    target_after_padding: bool = False
    """The first token behind left padding counts as a target, predicted from padding, as where
    labels are shifted."""
    blind_query: BlindQuery = "zero"
    """What attention gives a query that sees no key, such as padding in front of a row: 0, or the
    mean of all values, at position 0."""
    softmax_ranking: Ranking = "scores"
    """What a softmax gate ranks, and adds over a group, to choose its experts: scores or logits."""
    rope_layout: Layout = "interleaved"
    """How a head's rotated pairs lie in the weights: interleaved (released checkpoints) or
    halves."""

    def __post_init__(self) -> None:
        _check_choices(self)


CONVENTIONS: dict[str, Conventions] = {  # by the name that `--convention` takes
    "official": Conventions(),
    "paper": Conventions(mtp_order="hidden_embedding"),
    # transformers 5.24; its MTP drafts tokens, without a loss that runs; no balance loss
    "hf": Conventions(
        gate_epsilon=1e-20,
        latent_eps="class_default",
        yarn_when="always",
        yarn_factor="if_both",
        softmax_normalise="ignored",
        target_after_padding=True,
        blind_query="mean",
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one model. Letters are the dimension key of derivations/README.md."""

    vocabulary: int  # W, vocab_size
    width: int  # D, hidden_size, the paper's d
    layers: int  # num_hidden_layers
    dense_layers: int  # first_k_dense_replace: blocks with a dense FFN come first
    heads: int  # H, num_attention_heads, n_h
    q_latent: int | None  # A, q_lora_rank, d'_c; None: no query compression
    kv_latent: int  # C, kv_lora_rank, d_c
    nope: int  # N, qk_nope_head_dim, d_h
    rope: int  # R, qk_rope_head_dim, d_h^R
    value: int  # V, v_head_dim
    dense_hidden: int  # F of a dense block, intermediate_size
    expert_hidden: int  # F of an expert, moe_intermediate_size
    experts: int  # E, n_routed_experts, N_r
    shared_experts: int  # n_shared_experts, N_s
    top_k: int  # K, num_experts_per_tok, K_r
    groups: int = 1  # G, n_group
    keep_groups: int = 1  # topk_group, M
    gate: Score = "sigmoid"  # scoring_func
    group_score: GroupScore = "top2"  # V3 (noaux_tc); V2 (group_limited_greedy): max; paper: share
    tied: bool = False  # tie_word_embeddings: the head is the embedding table (V3: False)
    gate_bias: bool = True  # e_score_correction_bias exists
    normalise_weights: bool = True  # norm_topk_prob
    routed_scale: float = 1.0  # routed_scaling_factor
    mtp_depth: int = 0  # num_nextn_predict_layers, the paper's D
    norm_eps: float = 1e-6  # rms_norm_eps
    theta: float = 1e4  # rope_theta
    max_positions: int = 4096  # max_position_embeddings
    index_topk: int | None = None  # keys that V3.2's indexer chooses; all, up to so many tokens
    yarn: Yarn | None = None  # rope_scaling
    mtp_weight: float = 0.3  # λ: 0.3 for the first 10T tokens, then 0.1
    balance_weight: float = 1e-4  # α, aux_loss_alpha
    conventions: Conventions = field(default_factory=Conventions)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in ("dense_layers", "shared_experts", "mtp_depth") else 1
            expect_that(
                f.type != "int" or (isinstance(value, int) and value >= least),
                f"{f.name} must be an integer of at least {least}, got {value!r}",
            )
        _check_choices(self)
        for name in ("norm_eps", "theta", "routed_scale", "mtp_weight", "balance_weight"):
            value, least_number = getattr(self, name), 1.0 if name == "theta" else 0.0
            holds = isinstance(value, (int, float)) and value >= least_number and isfinite(value)
            expect_that(
                holds, f"{name} must be a finite number of at least {least_number}, got {value!r}"
            )
        if self.yarn is not None:
            check_yarn(self.yarn)
            expect_that(self.theta != 1, "theta must be above 1 with YaRN, got 1")
        expect_that(self.rope % 2 == 0, f"rope must be even, got {self.rope}")
        expect_that(
            self.dense_layers <= self.layers,
            f"dense_layers must be at most layers={self.layers}, got {self.dense_layers}",
        )
        expect_that(
            self.experts % self.groups == 0 and 1 <= self.keep_groups <= self.groups,
            f"groups must divide experts={self.experts} and keep_groups lie in 1…groups, "
            f"got {self.groups} and {self.keep_groups}",
        )
        reach = self.experts // self.groups * self.keep_groups
        expect_that(
            self.top_k <= reach,
            f"top_k must be at most {reach}, experts / groups × keep_groups, got {self.top_k}",
        )
        expect_that(
            self.index_topk is None or self.index_topk >= 1,
            f"index_topk must be at least 1 or None, got {self.index_topk}",
        )

    @property
    def context(self) -> int:
        """The most tokens that the model can read here: max_positions, and where an indexer was
        left out, those of which it would choose all."""
        return (
            self.max_positions
            if self.index_topk is None
            else min(self.max_positions, self.index_topk)
        )

    @property
    def mtp_starts_normed(self) -> bool:
        """Whether MTP module 1 reads the main model's hidden states after the final norm."""
        return self.conventions.mtp_hidden in ("normed", "normed_first")

    @property
    def mtp_hands_on_raw(self) -> bool:
        """Whether an MTP module hands its state on before its own norm."""
        return self.conventions.mtp_hidden in ("raw", "normed_first")

    @property
    def active_yarn(self) -> Yarn | None:
        """YaRN's settings if they apply under the conventions, else None."""
        if self.yarn is None or self.conventions.yarn_when == "always":
            return self.yarn
        return self.yarn if self.max_positions > self.yarn.original else None

    @property
    def rope_factor(self) -> float:
        """What cos and sin are multiplied with; 1 in released models."""
        yarn = self.active_yarn
        if yarn is None:
            return 1.0
        if self.conventions.yarn_factor == "if_both" and not (yarn.mscale and yarn.mscale_all_dim):
            return yarn_mscale(yarn.factor, 1.0)
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)

    @property
    def weight_rule(self) -> tuple[bool, float]:
        """Whether the chosen experts' scores are normalised, and what multiplies them then."""
        rule = self.conventions.softmax_normalise if self.gate == "softmax" else "scaled"
        normalise = self.normalise_weights and rule != "ignored"
        return normalise, 1.0 if normalise and rule == "unscaled" else self.routed_scale

    @property
    def ranking(self) -> Ranking:
        """What the gate ranks to choose its experts."""
        return self.conventions.softmax_ranking if self.gate == "softmax" else "scores"

    @property
    def latent_eps(self) -> float:
        """eps of the norms of the two latents."""
        return self.norm_eps if self.conventions.latent_eps == "config" else 1e-6


PRESETS: dict[str, ModelConfig] = {
    # All of V3's parts, at small sizes that tell them apart; every constant is off its neutral
    # value.
    "tiny": ModelConfig(
        vocabulary=256, width=20, layers=3, dense_layers=1, heads=3, q_latent=10, kv_latent=7,
        nope=5, rope=4, value=6, dense_hidden=22, expert_hidden=9, experts=8, shared_experts=2,
        top_k=3, groups=4, keep_groups=2, routed_scale=2.5, mtp_depth=2, norm_eps=1e-3,
        theta=100.0, max_positions=64,
        yarn=Yarn(4.0, original=16, beta_fast=4.0, beta_slow=1.0, mscale=0.9, mscale_all_dim=0.7),
        mtp_weight=0.3, balance_weight=0.01,
    ),
    # what the recipe trains in minutes on a laptop (refimpl/train): bytes and five tags as tokens
    "mini": ModelConfig(
        vocabulary=261, width=64, layers=2, dense_layers=1, heads=4, q_latent=32, kv_latent=32,
        nope=16, rope=16, value=16, dense_hidden=128, expert_hidden=32, experts=8, shared_experts=1,
        top_k=2, mtp_depth=1, theta=1000.0, max_positions=512,
        yarn=Yarn(16.0, original=32, beta_fast=4.0),
    ),
    "v3": ModelConfig(
        vocabulary=129280, width=7168, layers=61, dense_layers=3, heads=128, q_latent=1536,
        kv_latent=512, nope=128, rope=64, value=128, dense_hidden=18432, expert_hidden=2048,
        experts=256, shared_experts=1, top_k=8, groups=8, keep_groups=4, routed_scale=2.5,
        mtp_depth=1, max_positions=163840, yarn=Yarn(),
    ),
    "v2": ModelConfig(
        vocabulary=102400, width=5120, layers=60, dense_layers=1, heads=128, q_latent=1536,
        kv_latent=512, nope=128, rope=64, value=128, dense_hidden=12288, expert_hidden=1536,
        experts=160, shared_experts=2, top_k=6, groups=8, keep_groups=3, gate="softmax",
        group_score="max", gate_bias=False, normalise_weights=False, routed_scale=16.0,
        max_positions=163840, yarn=Yarn(mscale=0.707, mscale_all_dim=0.707), balance_weight=3e-3,
    ),
    "v2-lite": ModelConfig(
        vocabulary=102400, width=2048, layers=27, dense_layers=1, heads=16, q_latent=None,
        kv_latent=512, nope=128, rope=64, value=128, dense_hidden=10944, expert_hidden=1408,
        experts=64, shared_experts=2, top_k=6, gate="softmax", group_score="max", gate_bias=False,
        normalise_weights=False, max_positions=163840,
        yarn=Yarn(mscale=0.707, mscale_all_dim=0.707), balance_weight=1e-3,
    ),
    "moonlight-16b": ModelConfig(
        vocabulary=163840, width=2048, layers=27, dense_layers=1, heads=16, q_latent=None,
        kv_latent=512, nope=128, rope=64, value=128, dense_hidden=11264, expert_hidden=1408,
        experts=64, shared_experts=2, top_k=6, routed_scale=2.446, norm_eps=1e-5, theta=5e4,
        max_positions=8192, balance_weight=1e-3,
    ),
    "kimi-k2": ModelConfig(
        vocabulary=163840, width=7168, layers=61, dense_layers=1, heads=64, q_latent=1536,
        kv_latent=512, nope=128, rope=64, value=128, dense_hidden=18432, expert_hidden=2048,
        experts=384, shared_experts=1, top_k=8, routed_scale=2.827, theta=5e4,
        max_positions=131072, yarn=Yarn(factor=32.0, beta_fast=1.0, beta_slow=1.0),
        balance_weight=1e-3,
    ),
    "glm-4.7-flash": ModelConfig(
        vocabulary=154880, width=2048, layers=47, dense_layers=1, heads=20, q_latent=768,
        kv_latent=512, nope=192, rope=64, value=256, dense_hidden=10240, expert_hidden=1536,
        experts=64, shared_experts=1, top_k=4, routed_scale=1.8, mtp_depth=1, norm_eps=1e-5,
        theta=1e6, max_positions=202752,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The preset called ``name``; ValueError lists the names if there is none.

    >>> preset("v3").layers, preset("v3").experts
    (61, 256)
    """
    expect_that(name in PRESETS, f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
