"""The rows of the table: what each measures (`refimpl.bench.works`), at which sizes, and the least
bytes and products that it needs.

Letters: B sequences, T tokens, D width, H heads, X and V the widths of a head's keys and values, C
and R of a latent and of its rotated part, I hidden width of a feed-forward, E experts, K of them
per token, N = T·K rows sent to experts, W vocabulary. A row's bytes count each input read once and
each output written once, in the row's storage type, without what is smaller by a factor of the
width (weights of a norm, one number per row). Causal attention has half the products of the square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from .works import (
    Maker,
    Sizes,
    Work,
    adamw_work,
    attention_work,
    combine_work,
    cross_entropy_work,
    decode_work,
    experts_work,
    gate_work,
    grpo_work,
    head_work,
    permute_work,
    rms_norm_work,
    rope_work,
    swiglu_work,
)

__all__ = ["ROWS", "Row", "floor_of"]

# The card on which `Row.target` is a time, an H100 80GB: bytes per second of its own copy, flop per
# second of its own bfloat16 product
TARGET_COPY, TARGET_MATRIX = 3.0e12, 798e12
V3 = Sizes()
LENGTHS = 1, 4, 16, 32  # thousands of tokens, of attention
CACHES = 1, 4, 16, 64  # the same, of decoding
MIXTURES = (
    *((experts, "balanced") for experts in (8, 64, 256)),
    *((64, loads) for loads in ("Zipf", "one hot")),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    stem: str  # of the file in kernels/
    shape: str  # of `Sizes`, by their names
    formula: str  # of the bytes or flops, in the letters above
    bytes: Callable[[Sizes], int]
    make: Callable[[Maker], Work]
    storage: str = "bfloat16"
    flops: Callable[[Sizes], int] | None = None  # of dense products
    captured: bool = True  # in a CUDA graph; False for CuPy's products, which are timed as called
    # the first target in µs, on the card with TARGET_COPY and TARGET_MATRIX; None if not set
    target: float | None = None
    sizes: Sizes = V3

    def asked(self) -> float | None:
        """The share of the floor's rate that the target asks for, on any card."""
        if self.target is None:
            return None
        flops = self.flops(self.sizes) if self.flops else 0
        floor = floor_of(self.bytes(self.sizes), flops, TARGET_COPY, TARGET_MATRIX)
        return floor / (1e-6 * self.target)


def floor_of(moved: int, flops: int, copy: float, matrix: float) -> float:
    """The least seconds: ``moved`` bytes at ``copy`` bytes per second, or, if that takes longer,
    ``flops`` at ``matrix`` flop per second."""
    return max(moved / copy, flops / matrix)


def attention_rows(thousands: int) -> tuple[Row, Row]:
    """Forward and backward at so many times 1,024 tokens. The targets are set at 4,096 tokens, and
    grow with the square of their number."""
    sizes = replace(V3, tokens=1024 * thousands)
    both = partial(Row, stem="flash_attention", shape="tokens × heads × keys / values", sizes=sizes)
    forward = both(
        f"attention forward, {thousands}k",
        formula="T²H(X + V)",
        bytes=lambda s: 4 * s.tokens * s.heads * (s.keys + s.values),
        flops=lambda s: s.tokens**2 * s.heads * (s.keys + s.values),
        make=partial(attention_work, backward=False),
        target=2_200 * (thousands / 4) ** 2,
    )
    backward = both(
        f"attention backward, {thousands}k",
        formula="T²H(3X + 2V)",
        bytes=lambda s: 8 * s.tokens * s.heads * (s.keys + s.values),
        flops=lambda s: s.tokens**2 * s.heads * (3 * s.keys + 2 * s.values),
        make=partial(attention_work, backward=True),
        target=7_500 * (thousands / 4) ** 2,
    )
    return forward, backward


def decode_row(heads: int, thousands: int) -> Row:
    """A new token of each of 128 sequences, over caches of so many times 1,024 tokens. The targets
    are set at 4,096, and grow with the cache."""
    return Row(
        f"MLA decode, {heads} heads, {thousands}k",
        stem="mla_decode",
        shape="sequences × heads × tokens × latent / rotated",
        formula="2BHT(2C + R)",
        bytes=lambda s: 2 * s.sequences * s.tokens * (s.latent + s.rotated),
        flops=lambda s: 2 * s.sequences * s.heads * s.tokens * (2 * s.latent + s.rotated),
        make=decode_work,
        target=(400 if heads == 128 else 225) * thousands / 4,
        sizes=replace(V3, heads=heads, tokens=1024 * thousands),
    )


def experts_row(experts: int, loads: str) -> Row:
    """4,096 tokens with 8 experts each, forward and backward."""
    return Row(
        f"MoE layer, {experts} experts, {loads}",
        stem="grouped_linear",
        shape="tokens × top_k × width × expert_hidden",
        formula="18NDI",
        bytes=lambda s: s.width * (8 * s.tokens + 18 * s.experts * s.expert_hidden),
        flops=lambda s: 18 * s.tokens * s.top_k * s.width * s.expert_hidden,
        make=partial(experts_work, loads=loads),
        target=21_700 if experts <= 64 else None,  # 400 TFLOP/s
        sizes=replace(V3, experts=experts),
    )


ROWS = {
    row.name: row
    for row in (
        Row(
            "RMSNorm forward",
            "rms_norm",
            "tokens × width",
            "4TD",
            lambda s: 4 * s.tokens * s.width,
            partial(rms_norm_work, backward=False),
            target=45,
        ),
        Row(
            "RMSNorm backward",
            "rms_norm",
            "tokens × width",
            "6TD",
            lambda s: 6 * s.tokens * s.width,
            partial(rms_norm_work, backward=True),
            target=70,
        ),
        Row(
            "RoPE forward",
            "rope",
            "tokens × heads × rotated",
            "4TH·64",
            lambda s: 4 * s.tokens * s.heads * s.rotated,
            partial(rope_work, backward=False),
            target=50,
        ),
        Row(
            "RoPE backward",
            "rope",
            "tokens × heads × rotated",
            "4TH·64",
            lambda s: 4 * s.tokens * s.heads * s.rotated,
            partial(rope_work, backward=True),
            target=50,
        ),
        Row(
            "SwiGLU forward",
            "swiglu",
            "tokens × hidden",
            "6TI",
            lambda s: 6 * s.tokens * s.hidden,
            partial(swiglu_work, backward=False),
            target=165,
        ),
        Row(
            "SwiGLU backward",
            "swiglu",
            "tokens × hidden",
            "10TI",
            lambda s: 10 * s.tokens * s.hidden,
            partial(swiglu_work, backward=True),
            target=275,
        ),
        *(row for thousands in LENGTHS for row in attention_rows(thousands)),
        *(decode_row(heads, thousands) for heads in (16, 128) for thousands in CACHES),
        Row(
            "gate top-k",
            "router",
            "tokens × experts / top_k / keep_groups / groups",
            "4TE",
            lambda s: 4 * s.tokens * s.experts,
            gate_work,
            "float32",
            target=7,
        ),
        Row(
            "MoE permute",
            "moe",
            "tokens × top_k × width",
            "2TD + 2ND",
            lambda s: 2 * s.tokens * s.width * (1 + s.top_k),
            permute_work,
            target=210,
        ),
        Row(
            "MoE combine",
            "moe",
            "tokens × top_k × width",
            "2TD + 2ND",
            lambda s: 2 * s.tokens * s.width * (1 + s.top_k),
            combine_work,
            target=210,
        ),
        *(experts_row(*row) for row in MIXTURES),
        Row(
            "CE forward + backward in place",
            "cross_entropy",
            "tokens × vocabulary",
            "4TW",
            lambda s: 4 * s.tokens * s.vocabulary,
            cross_entropy_work,
            target=1150,
        ),
        Row(
            "head + CE",
            "cross_entropy",
            "tokens × width × vocabulary",
            "6TDW",
            lambda s: (4 * s.tokens + 6 * s.vocabulary) * s.width,
            head_work,
            flops=lambda s: 6 * s.tokens * s.width * s.vocabulary,
            captured=False,
            target=33_000,
        ),
        Row(
            "GRPO from log-probabilities",
            "grpo",
            "outputs × length",
            "24 B a token",
            lambda s: 24 * s.outputs * s.length,
            grpo_work,
            "float32",
        ),
        Row(
            "AdamW step",
            "adamw",
            "parameters",
            "28 B a parameter",
            lambda s: 28 * s.parameters,
            adamw_work,
            "float32",
            target=2_740,
        ),
    )
}
"""By name, in the order of the table."""
