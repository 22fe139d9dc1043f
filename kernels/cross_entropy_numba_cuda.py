"""Cross-entropy in Numba CUDA: what cross_entropy.cu does, on the same arguments, for reading.

The forward reads the logits twice, for their maximum and for the sum; cross_entropy.cu does both in
one pass. The backward recomputes the probabilities, so that none are kept. Derivation:
derivations/cross_entropy.md.
"""

import math

from .common_numba_cuda import WARP, CPointer, block_max, block_sum, cuda, int32, int64


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals, ids = CPointer(real), CPointer(int64)
    each = (
        4 * 128 // real.bitwidth
    )  # logits of a thread in the backward: 64 bytes, as the host counts blocks

    def cross_entropy_forward(
        largest_of_row: reals,
        sum_of_row: reals,
        chosen: reals,
        logits: reals,
        targets: ids,
        vocabulary: int32,
    ):
        """Of each row: its maximum, Σ e^(z − maximum), and the log of the target's probability.
        Grid: a block per row."""
        part = cuda.shared.array(WARP, real)
        row = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        threads = cuda.blockDim.x
        start = row * vocabulary
        largest = real(-math.inf)
        for w in range(thread, vocabulary, threads):
            largest = max(largest, logits[start + w])
        largest = block_max(part, largest)
        total = real(0)
        for w in range(thread, vocabulary, threads):
            total += math.exp(logits[start + w] - largest)  # at most 1 each: nothing overflows
        total = block_sum(part, total)
        if thread == 0:
            largest_of_row[row] = largest
            sum_of_row[row] = total
            chosen[row] = (
                logits[start + targets[row]] - largest - math.log(total)
            )  # (cross_entropy.1)

    def cross_entropy_loss(loss: reals, chosen: reals, weight: reals, rows: int64):
        """loss = −Σ_row weight chosen, rows of weight 0 left out. Grid: one block."""
        part = cuda.shared.array(WARP, real)
        total = real(0)
        for row in range(cuda.threadIdx.x, rows, cuda.blockDim.x):
            if weight[row] != real(0):
                total += weight[row] * chosen[row]
        total = block_sum(part, total)
        if cuda.threadIdx.x == 0:
            loss[0] = -total  # (cross_entropy.2)

    def cross_entropy_backward(
        dlogits: reals,
        logits: reals,
        largest_of_row: reals,
        sum_of_row: reals,
        targets: ids,
        weight: reals,
        dloss: reals,
        vocabulary: int32,
    ):
        """dlogits = dloss weight (p − 1[w = target]), p = e^(z − maximum) / sum; dlogits may be
        logits itself.

        Grid: for each row, as many blocks as cover it with ``each`` logits a thread.
        """
        span = cuda.blockDim.x * each  # logits of a block
        blocks = (vocabulary + span - 1) // span  # of a row
        row, first = cuda.blockIdx.x // blocks, cuda.blockIdx.x % blocks * span
        start, scale = row * vocabulary, dloss[0] * weight[row]
        for w in range(first + cuda.threadIdx.x, min(first + span, vocabulary), cuda.blockDim.x):
            p = math.exp(logits[start + w] - largest_of_row[row]) / sum_of_row[row]
            if w == targets[row]:
                p -= real(1)
            counts = weight[row] != real(0)  # what stands at the others, NaN included, does not
            dlogits[start + w] = scale * p if counts else real(0)  # (cross_entropy.3)

    def cross_entropy_in_place(
        logits: reals, chosen: reals, targets: ids, weight: reals, dloss: reals, vocabulary: int32
    ):
        """The forward's ``chosen``, and the gradient over the logits. Grid: a block per row."""
        part = cuda.shared.array(WARP, real)
        row = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        threads = cuda.blockDim.x
        start = row * vocabulary
        own = logits[start + targets[row]]  # before it is overwritten
        largest = real(-math.inf)
        for w in range(thread, vocabulary, threads):
            largest = max(largest, logits[start + w])
        largest = block_max(part, largest)
        total = real(0)
        for w in range(thread, vocabulary, threads):
            total += math.exp(logits[start + w] - largest)
        total = block_sum(part, total)
        if thread == 0:
            chosen[row] = own - largest - math.log(total)  # (cross_entropy.1)
        scale = dloss[0] * weight[row]
        for w in range(thread, vocabulary, threads):  # each thread those that it has read itself
            p = math.exp(logits[start + w] - largest) / total
            if w == targets[row]:
                p -= real(1)
            logits[start + w] = (
                scale * p if weight[row] != real(0) else real(0)
            )  # (cross_entropy.3)

    return cross_entropy_forward, cross_entropy_loss, cross_entropy_backward, cross_entropy_in_place
