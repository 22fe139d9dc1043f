"""Log-probabilities of chosen tokens on kernels/cross_entropy.cu; as `refimpl.ops.log_prob`, and
for bfloat16.

The products are cuBLAS's, the log-sum-exp and the gradient, which is written over the logits, are
the kernels'. A GPU wants large products, so logits are made in blocks of at least `BLOCK`, whatever
``block`` is: as many whole rows in the forward, so that no sum of a row depends on the block, and
blocks of tokens × vocabulary in the backward, where dw is then written once for each block of
tokens. The gradient of bfloat16's logits is float32, and is rounded to bfloat16 for the products
that make dh and dw, each element by at most 2⁻⁸ of itself; with ``terms`` = 3 the products take all
of its bits, at twice the work of the whole op.
"""

from __future__ import annotations

from typing import NamedTuple

from ..array import Array, blocks, expect, library
from ..ops import AnyOp, Op
from ..ops.cross_entropy import token_weights
from ..ops.log_prob import check_log_prob
from .cross_entropy import softmax_gradient, softmax_statistics
from .host import matmul, numbers, parts, product, ready
from .launch import Launch

__all__ = ["LogProbSaved", "log_prob"]

BLOCK = 4096, 16384  # tokens, vocabulary: 256 MiB of float32 logits
TILE = 128  # rows that a product is best a multiple of


class LogProbSaved(NamedTuple):
    """What the forward of `log_prob` keeps for its backward."""

    h: Array  # […, D]: logits are recomputed from it; 0 for tokens that are left out
    w: Array  # [W, D]
    largest: Array  # [M]: the largest logit of each token
    total: Array  # [M]: Σ e^(z − largest)
    targets: Array  # [M]
    mask: Array  # [M]
    temperature: float
    block: tuple[int, int]  # tokens, vocabulary


def log_prob(launch: Launch, *, terms: int = 1) -> AnyOp:
    """The op on ``launch``. terms: bfloat16 numbers that stand for one of the logits' gradient,
    1 to 3; of other types the gradient is taken as it is."""
    if terms not in (1, 2, 3):
        raise ValueError(f"terms must be 1, 2 or 3, got {terms}")

    def logits(rows: Array, w: Array, saved: LogProbSaved) -> Array:
        z = product(rows, w.T, numbers(h=rows).real)
        if saved.temperature != 1:
            z /= saved.temperature
        return z

    def log_prob_forward(
        h: Array,
        w: Array,
        *,
        targets: Array,
        mask: Array | None = None,
        temperature: float = 1.0,
        block: tuple[int, int] = (256, 4096),
    ) -> tuple[Array, LogProbSaved]:
        n = numbers(h=h, w=w)
        check_log_prob(h, w, targets, temperature, block)
        like, given = n.xp.zeros((1,), dtype=n.real), mask is not None
        targets, mask = token_weights(like, targets, mask, 1.0, w.shape[0])
        targets, mask = ready(targets.reshape(-1)), mask.reshape(-1)
        rows = h.reshape(-1, h.shape[-1])
        if given:
            rows = _rows_that_count(rows, mask)
        largest, total, chosen = (n.xp.zeros((targets.size,), dtype=n.real) for _ in range(3))
        block = max(block[0], BLOCK[0]), max(block[1], BLOCK[1])
        saved = LogProbSaved(
            rows.reshape(h.shape), w, largest, total, targets, mask, float(temperature), block
        )
        for start, stop in blocks(targets.size, _rows(block, w.shape[0])):
            z = logits(rows[start:stop], w, saved)
            part = slice(start, stop)
            largest[part], total[part], chosen[part] = softmax_statistics(
                launch, z, ready(targets[part])
            )
        return n.xp.where(mask != 0, mask * chosen, n.scalar(0)).reshape(h.shape[:-1]), saved

    def log_prob_backward(dy: Array, saved: LogProbSaved) -> tuple[Array, Array]:
        h, w, largest, total, targets, mask, temperature, block = saved
        n = numbers(h=h)
        expect("dy", dy, "(…)", tuple(h.shape[:-1]))
        rows = h.reshape(-1, h.shape[-1])
        weight = -dy.reshape(-1).astype(n.real, copy=False) * mask / n.scalar(temperature)
        dh, dw = n.xp.zeros(rows.shape, dtype=h.dtype), n.xp.zeros(w.shape, dtype=n.real)
        for start, stop in blocks(targets.size, block[0]):
            x, sums = rows[start:stop], n.xp.empty((stop - start, rows.shape[1]), dtype=n.real)
            peak, sum_of, own, scale = (
                ready(each[start:stop]) for each in (largest, total, targets, weight)
            )
            for w0, w1 in blocks(w.shape[0], block[1]):
                z = logits(x, w[w0:w1], saved)
                dz = softmax_gradient(launch, z, z, peak, sum_of, own - w0, scale, dloss=1.0)
                for i, part in enumerate(parts(dz, w.dtype, terms)):
                    matmul(part, w[w0:w1], sums, add=w0 + i > 0)
                    matmul(part.T, x, dw[w0:w1], add=start + i > 0)
            dh[start:stop] = sums.astype(h.dtype, copy=False)
        return dh.reshape(h.shape), dw

    return Op(log_prob_forward, log_prob_backward)


def _rows_that_count(rows: Array, mask: Array) -> Array:
    """``rows`` [M, D] with 0 where ``mask`` is 0, whatever stands there, NaN included; by their
    bits, since CuPy chooses among few types that are not its own."""
    bits = ready(rows).view(f"u{rows.dtype.itemsize}")
    zero = bits.dtype.type(0)
    return library(rows).where(mask[:, None] != 0, bits, zero).view(rows.dtype)


def _rows(block: tuple[int, int], vocabulary: int) -> int:
    """How many whole rows of logits have a block's number of entries, at least one."""
    rows = max(block[0] * block[1] // vocabulary, 1)
    return rows - rows % TILE if rows > TILE else rows
