"""Cross-entropy of given logits on kernels/cross_entropy.cu; as `refimpl.ops.cross_entropy`, and
for bfloat16.

Saved are the logits and two numbers per row, not the probabilities: nothing of the logits' size is
made in the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from ..array import Array, expect, last
from ..ops import AnyOp, Op
from ..ops.cross_entropy import token_weights
from .host import Kernels, Numbers, cover, numbers, ready
from .launch import Launch

__all__ = [
    "CrossEntropySaved",
    "cross_entropy",
    "cross_entropy_in_place",
    "softmax_gradient",
    "softmax_statistics",
]

ROW_THREADS = {"float64": 512, "float32": 1024}  # of a block per row, at most, by arithmetic
THREADS, BATCH = 128, 4  # threads of a block of the backward; chunks of a thread, of all kernels


class CrossEntropySaved(NamedTuple):
    """What the forward of `cross_entropy` keeps for its backward."""

    logits: Array  # […, W]: probabilities are recomputed from them
    largest: Array  # [rows]: the maximum, in float32 for bfloat16
    total: Array  # [rows]: Σ e^(z − largest)
    targets: Array  # [rows] int64
    weight: Array  # [rows]: mask / normaliser


def cross_entropy(launch: Launch) -> AnyOp:
    """The op on ``launch``."""
    kernels = Kernels(launch, "cross_entropy")

    def cross_entropy_forward(
        logits: Array, *, targets: Array, mask: Array | None = None, normaliser: float | None = None
    ) -> tuple[Array, CrossEntropySaved]:
        n, logits, targets, weight = _prepared(logits, targets, mask, normaliser)
        largest, total, chosen = softmax_statistics(launch, logits, targets)
        loss = _loss(kernels, n, chosen, weight)
        return loss, CrossEntropySaved(logits, largest, total, targets, weight)

    def cross_entropy_backward(dloss: Array, saved: CrossEntropySaved) -> Array:
        out = kernels.empty(saved.logits.shape, saved.logits.dtype, saved.logits)
        return softmax_gradient(launch, out, *saved, dloss)

    return Op(cross_entropy_forward, cross_entropy_backward)


def cross_entropy_in_place(launch: Launch) -> Callable[..., tuple[Array, Array]]:
    """Loss and gradient in one, for who knows ``dloss`` beforehand: dlogits is written over the
    logits, which are lost, and memory reads them once.

    Not the table's op, since an op changes nothing. ``logits`` itself is returned as the gradient,
    if it was contiguous.
    """
    kernels = Kernels(launch, "cross_entropy")

    def cross_entropy_and_gradient(
        logits: Array,
        *,
        targets: Array,
        mask: Array | None = None,
        normaliser: float | None = None,
        dloss: Any = 1.0,
    ) -> tuple[Array, Array]:
        n, logits, targets, weight = _prepared(logits, targets, mask, normaliser)
        vocabulary = logits.shape[-1]
        chosen = kernels.empty((targets.size,), n.real, logits)
        dloss = n.xp.asarray(dloss, dtype=n.real).reshape(1)
        kernels(
            "cross_entropy_in_place",
            n.storage,
            targets.size,
            _row_threads(vocabulary, n),
            logits,
            chosen,
            targets,
            weight,
            dloss,
            vocabulary,
        )
        return _loss(kernels, n, chosen, weight), logits

    return cross_entropy_and_gradient


def _prepared(
    logits: Array, targets: Array, mask: Array | None, normaliser: float | None
) -> tuple[Numbers, Array, Array, Array]:
    """Number types; logits, targets [rows] and weights [rows] as kernels want them."""
    n = numbers(logits=logits)
    expect("targets", targets, "(…)", tuple(logits.shape[:-1]))
    like = n.xp.zeros((1,), dtype=n.real)
    targets, weight = token_weights(like, targets, mask, normaliser, last(logits, "logits"))
    return n, ready(logits), ready(targets.reshape(-1)), ready(weight.reshape(-1))


def _loss(kernels: Kernels, n: Numbers, chosen: Array, weight: Array) -> Array:
    """The scalar −Σ weight · chosen."""
    loss = kernels.empty((1,), n.real, chosen)
    rows = n.xp.int64(chosen.size)
    kernels("cross_entropy_loss", n.storage, 1, 256, loss, chosen, weight, rows)
    return loss.reshape(())


def _row_threads(vocabulary: int, n: Numbers) -> int:
    """Threads of a block that has a row of logits for itself: whole warps, with work for each."""
    return min(ROW_THREADS[n.real.name], 32 * cover(vocabulary, 32 * BATCH * n.vector))


def softmax_statistics(launch: Launch, logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """(maximum, Σ e^(z − maximum), log-probability of the target), each [rows], of contiguous
    ``logits`` […, W] and ``targets`` [rows]."""
    kernels, n = Kernels(launch, "cross_entropy"), numbers(logits=logits)
    rows, vocabulary = prod(logits.shape[:-1]), logits.shape[-1]
    largest, total, chosen = (kernels.empty((rows,), n.real, logits) for _ in range(3))
    kernels(
        "cross_entropy_forward",
        n.storage,
        rows,
        _row_threads(vocabulary, n),
        largest,
        total,
        chosen,
        logits,
        targets,
        vocabulary,
    )
    return largest, total, chosen


def softmax_gradient(
    launch: Launch,
    out: Array,
    logits: Array,
    largest: Array,
    total: Array,
    targets: Array,
    weight: Array,
    dloss: Any,
) -> Array:
    """``out`` = dloss · weight (softmax(logits) − one-hot(targets)); ``out`` may be ``logits``.

    Args:
        out, logits: […, W].
        largest, total, targets, weight: [rows], as in `CrossEntropySaved`.
    """
    kernels, n = Kernels(launch, "cross_entropy"), numbers(logits=logits)
    rows, vocabulary = prod(logits.shape[:-1]), logits.shape[-1]
    dloss = n.xp.asarray(dloss, dtype=n.real).reshape(1)
    blocks = rows * cover(vocabulary, THREADS * BATCH * n.vector)
    kernels(
        "cross_entropy_backward",
        n.storage,
        blocks,
        THREADS,
        out,
        logits,
        largest,
        total,
        targets,
        weight,
        dloss,
        vocabulary,
    )
    return out
