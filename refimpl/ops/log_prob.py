"""Log-probabilities of chosen tokens straight from hidden states, in blocks: the logits are never
whole in memory.

log π(target) = z[target] − log Σ_w e^{z_w} with z = W h / temperature. Blocks of tokens ×
vocabulary are computed, used and forgotten, in the forward with an online log-sum-exp and again in
the backward. GRPO needs just this; the training loss (`head_cross_entropy`) is its masked mean.
Derivation: derivations/log_prob.md. Letters: D model, W vocabulary, M tokens (the product of the
leading dimensions ``…``).
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

from ..array import (
    Array,
    add_to,
    blocks,
    cast,
    expect,
    expect_some,
    expect_that,
    fill,
    last,
    namespace,
    put,
    real,
    zeros,
)
from .cross_entropy import token_weights

__all__ = ["LogProbSaved", "log_prob_backward", "log_prob_forward"]


class LogProbSaved(NamedTuple):
    """What `log_prob_forward` keeps for `log_prob_backward`."""

    h: Array  # […, D]: logits are recomputed from it; 0 for tokens that are left out
    w: Array  # [W, D]
    lse: Array  # [M, 1]: log Σ e^z of each token
    targets: Array  # [M]
    mask: Array  # [M]
    temperature: float
    block: tuple[int, int]


def log_prob_forward(
    h: Array,
    w: Array,
    *,
    targets: Array,
    mask: Array | None = None,
    temperature: float = 1.0,
    block: tuple[int, int] = (256, 4096),
) -> tuple[Array, LogProbSaved]:
    """log π(targets) […] for hidden states ``h`` […, D] and the output head ``w`` [W, D]; 0 where
    ``mask`` is 0, whatever ``h`` is there, NaN included.

    Args:
        targets, mask: […] integers; […] bool or finite weights that multiply the result.
        temperature: divides the logits; > 0.
        block: tokens × vocabulary entries computed at a time: the only memory that logits take.
    """
    xp = namespace(h=h, w=w)
    check_log_prob(h, w, targets, temperature, block)
    masked = mask is not None
    targets, mask = token_weights(h, targets, mask, 1.0, w.shape[0])
    temperature = float(temperature)
    targets, mask = xp.reshape(targets, (-1,)), xp.reshape(mask, (-1,))
    rows = xp.reshape(h, (-1, h.shape[-1]))
    if masked:
        rows = fill((real(mask) != 0)[:, None], rows, 0.0)  # absent, NaN included
    chosen, lse = zeros((rows.shape[0], 1), rows), zeros((rows.shape[0], 1), rows)
    for m0, m1 in blocks(rows.shape[0], block[0]):
        scaled = rows[m0:m1, :] / temperature
        total = zeros((m1 - m0, 1), rows)
        largest = real(total) - xp.inf
        for w0, w1 in blocks(w.shape[0], block[1]):
            z = xp.matmul(scaled, xp.matrix_transpose(w[w0:w1, :]))  # (log_prob.1)
            larger = xp.maximum(largest, xp.max(real(z), axis=-1, keepdims=True))
            shift = cast(xp.where(larger > -xp.inf, larger, 0.0), z)  # all −∞ so far: e^−∞ is 0
            decay = xp.exp(cast(largest, z) - shift)
            # a block that has a name would still be held while the next is computed
            block_total = xp.sum(xp.exp(z - shift), axis=-1, keepdims=True)
            total = total * decay + block_total  # (log_prob.2)
            target_logit = _pick(z, targets[m0:m1, None] - w0)  # (log_prob.3)
            chosen = add_to(chosen, (slice(m0, m1), ...), target_logit)
            largest = larger
        lse = put(lse, (slice(m0, m1), ...), cast(largest, rows) + xp.log(total))  # (log_prob.4)
    y = mask * (chosen - lse)[:, 0]  # (log_prob.5)
    saved = LogProbSaved(xp.reshape(rows, h.shape), w, lse, targets, mask, temperature, block)
    return xp.reshape(y, h.shape[:-1]), saved


def log_prob_backward(dy: Array, saved: LogProbSaved) -> tuple[Array, Array]:
    """Gradients (dh […, D], dw [W, D]) from ``dy`` […], the gradient of each token's
    log-probability."""
    h, w, lse, targets, mask, temperature, block = saved
    xp = namespace(dy=dy, h=h)
    expect("dy", dy, "(…)", tuple(h.shape[:-1]))
    rows = xp.reshape(h, (-1, h.shape[-1]))
    weight = (xp.reshape(dy, (-1,)) * mask)[:, None] / temperature
    dh, dw = zeros(rows.shape, rows), zeros(w.shape, rows)
    for m0, m1 in blocks(rows.shape[0], block[0]):
        scaled = rows[m0:m1, :] / temperature
        for w0, w1 in blocks(w.shape[0], block[1]):
            z = xp.matmul(scaled, xp.matrix_transpose(w[w0:w1, :]))
            p = xp.exp(z - lse[m0:m1, :])  # (log_prob.6)
            is_target = xp.arange(w0, w1, device=p.device) == targets[m0:m1, None]
            dz = weight[m0:m1, :] * (cast(is_target, p) - p)  # (log_prob.7)
            dh = add_to(dh, (slice(m0, m1), ...), xp.matmul(dz, w[w0:w1, :]))  # (log_prob.8)
            # (log_prob.9)
            dw = add_to(
                dw, (slice(w0, w1), ...), xp.matmul(xp.matrix_transpose(dz), rows[m0:m1, :])
            )
    return xp.reshape(dh, h.shape), dw


def _pick(z: Array, targets: Array) -> Array:
    """Each row's target logit [m, 1], 0 where the target lies in another block than ``z`` [m, w];
    ``targets`` [m, 1] are counted from its first entry."""
    xp = namespace(z=z)
    here = (targets >= 0) & (targets < z.shape[1])
    return fill(here, xp.take_along_axis(z, xp.where(here, targets, 0), axis=1), 0.0)


def check_log_prob(
    h: Array, w: Array, targets: Array, temperature: float, block: tuple[int, int]
) -> None:
    """ValueError unless what `log_prob_forward` is given fits together."""
    expect("w", w, "(W, D)", (None, last(h, "h")))
    expect_some("w", w, "(W, D)")
    expect("targets", targets, "(…)", tuple(h.shape[:-1]))
    expect_that(
        isfinite(temperature) and temperature > 0 and min(block) >= 1,
        "temperature must be positive and finite and block at least (1, 1), got "
        f"{temperature}, {block}",
    )
