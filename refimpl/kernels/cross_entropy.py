"""Cross-entropy of given logits on kernels/cross_entropy.cu; as `refimpl.ops.cross_entropy`, and
for bfloat16.

Saved are the logits and two numbers a row, not the probabilities: nothing of the logits' size is
made in the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from ..array import Array, expect, last
from ..ops import AnyOp, Op
from ..ops.cross_entropy import token_weights
from .host import Kernels, cover, numbers, ready
from .launch import Launch

__all__ = [
    "CrossEntropySaved",
    "cross_entropy",
    "cross_entropy_in_place",
    "softmax_gradient",
    "softmax_statistics",
]

ROW_THREADS = 512  # of the forward: a block a row
THREADS, BATCH = 128, 4  # of the backward: threads of a block, and chunks of a thread


class CrossEntropySaved(NamedTuple):
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
        n = numbers(logits=logits)
        expect("targets", targets, "(…)", tuple(logits.shape[:-1]))
        like = n.xp.zeros((1,), dtype=n.real)
        targets, weight = token_weights(like, targets, mask, normaliser, last(logits, "logits"))
        logits, targets, weight = (
            ready(logits),
            ready(targets.reshape(-1)),
            ready(weight.reshape(-1)),
        )
        largest, total, chosen = softmax_statistics(launch, logits, targets)
        loss = kernels.empty((1,), n.real, logits)
        kernels(
            "cross_entropy_loss", n.storage, 1, 256, loss, chosen, weight, n.xp.int64(targets.size)
        )
        return loss.reshape(()), CrossEntropySaved(logits, largest, total, targets, weight)

    def cross_entropy_backward(dloss: Array, saved: CrossEntropySaved) -> Array:
        out = kernels.empty(saved.logits.shape, saved.logits.dtype, saved.logits)
        return softmax_gradient(launch, out, *saved, dloss)

    return Op(cross_entropy_forward, cross_entropy_backward)


def cross_entropy_in_place(launch: Launch) -> Callable[[Array, CrossEntropySaved], Array]:
    """The backward that writes dlogits over the logits, which are lost: no second array of their
    size exists.

    Not the table's op, since an op changes nothing. ``saved.logits`` is the caller's own array, if
    that was contiguous.
    """

    def cross_entropy_backward_in_place(dloss: Array, saved: CrossEntropySaved) -> Array:
        return softmax_gradient(launch, saved.logits, *saved, dloss)

    return cross_entropy_backward_in_place


def softmax_statistics(launch: Launch, logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """(maximum, Σ e^(z − maximum), log-probability of the target), each [rows], of contiguous
    ``logits`` […, W] and ``targets`` [rows]."""
    kernels, n = Kernels(launch, "cross_entropy"), numbers(logits=logits)
    rows, vocabulary = prod(logits.shape[:-1]), logits.shape[-1]
    largest, total, chosen = (kernels.empty((rows,), n.real, logits) for _ in range(3))
    threads = min(ROW_THREADS, 32 * cover(vocabulary, 32 * n.vector))
    kernels(
        "cross_entropy_forward",
        n.storage,
        rows,
        threads,
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
    """``out`` = dloss · weight (softmax(logits) − one-hot(targets)); ``out`` may be ``logits``."""
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
