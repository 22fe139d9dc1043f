"""The gate of the mixture of experts in Numba CUDA: what router.cu does, on the same arguments, for
reading.

A warp takes a row; its 32 threads, the lanes, take the experts lane, lane + 32, … The logits are
the host's. Who is chosen is found by counting: an expert's rank is the number of experts that come
before it. Derivation: derivations/router.md.
"""

import math

from .common_numba_cuda import WARP, CPointer, cuda, int32, int64, make_sigmoid, warp_max, warp_sum


@cuda.jit(device=True, inline="always")
def rank(values, start, stop, i):
    """How many of values[start … stop − 1] come before values[i]: the larger, and equal ones of
    lower index. NaN comes after every number, −∞ too, as in the reference's sort."""
    count = 0
    for j in range(start, stop):
        larger = values[j] > values[i] or (math.isnan(values[i]) and not math.isnan(values[j]))
        equal = values[j] == values[i] or (math.isnan(values[i]) and math.isnan(values[j]))
        if larger or (equal and j < i):
            count += 1
    return count


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals = CPointer(real)
    ids = CPointer(int64)
    sigmoid = make_sigmoid(real)

    def router_forward(
        scores: reals,
        weights: reals,
        indices: ids,
        logits: reals,
        bias: reals,
        rows: int64,
        experts: int32,
        top_k: int32,
        groups: int32,
        keep_groups: int32,
        summed: int32,
        hidden: real,
        softmax: int32,
        normalise: int32,
        scale: real,
        epsilon: real,
        replay: int32,
    ):
        """scores [rows, experts] from logits, and weights and indices [rows, top_k], top_k at most
        32.

        indices are chosen here, or given if ``replay``. softmax: else sigmoid. summed: how many of
        a group's best make its score. hidden: what the score of an expert of a group that is not
        kept becomes, −∞ or 0. Shared memory: 2 experts + groups, for each warp.
        """
        lane = cuda.threadIdx.x % WARP
        row = cuda.grid(1) // WARP
        if row >= rows:  # whole warps leave: nothing below waits for another warp
            return
        memory = cuda.shared.array(0, real)  # its size is the launch's
        own = cuda.threadIdx.x // WARP * (2 * experts + groups)  # where this warp's scores begin
        biased = own + experts  # and these, with the bias
        of_group = biased + experts
        z = row * experts

        largest, total = real(-math.inf), real(0)
        if softmax:
            for e in range(lane, experts, WARP):
                largest = max(largest, logits[z + e])
            largest = warp_max(largest)
            for e in range(lane, experts, WARP):
                total += math.exp(logits[z + e] - largest)
            total = warp_sum(total)
        for e in range(lane, experts, WARP):
            if softmax:  # noqa: SIM108
                s = math.exp(logits[z + e] - largest) / total  # (router.3)
            else:
                s = sigmoid(logits[z + e])  # (router.2)
            scores[z + e] = s
            memory[own + e] = s
            memory[biased + e] = s + bias[e]  # (router.4)
        cuda.syncwarp()  # a lane reads below what the others wrote above

        if not replay and keep_groups < groups:
            size = experts // groups
            for g in range(lane, groups, WARP):
                first, last = biased + g * size, biased + (g + 1) * size
                best = real(0)
                for k in range(
                    summed
                ):  # the best first: the order of a sum matters to its last bit
                    for i in range(first, last):
                        if rank(memory, first, last, i) == k:
                            best += memory[i]
                memory[of_group + g] = best
            cuda.syncwarp()
            for e in range(lane, experts, WARP):
                if rank(memory, of_group, of_group + groups, of_group + e // size) >= keep_groups:
                    memory[biased + e] = hidden  # (router.5)
            cuda.syncwarp()

        if not replay:
            for e in range(lane, experts, WARP):
                k = rank(memory, biased, biased + experts, biased + e)
                if k < top_k:
                    indices[row * top_k + k] = e
            cuda.syncwarp()
        chosen = real(0)  # lane k has the k-th
        if lane < top_k:
            chosen = memory[own + indices[row * top_k + lane]]
        divisor = warp_sum(chosen) + epsilon if normalise else real(1)
        if lane < top_k:
            weights[row * top_k + lane] = scale * chosen / divisor  # (router.6)

    def router_backward(
        dlogits: reals,
        dweights: reals,
        dscores: reals,
        scores: reals,
        indices: ids,
        rows: int64,
        experts: int32,
        top_k: int32,
        softmax: int32,
        normalise: int32,
        scale: real,
        epsilon: real,
        with_scores: int32,
    ):
        """dlogits [rows, experts] from dweights [rows, top_k] and, if ``with_scores``, dscores
        [rows, experts]."""
        lane = cuda.threadIdx.x % WARP
        row = cuda.grid(1) // WARP
        if row >= rows:
            return
        z, choices = row * experts, row * top_k
        divisor, mean = real(1), real(0)
        if normalise:
            chosen, product = real(0), real(0)
            if lane < top_k:
                chosen = scores[z + indices[choices + lane]]
                product = scale * dweights[choices + lane] * chosen
            divisor = warp_sum(chosen) + epsilon
            mean = warp_sum(product) / divisor
        inner = real(0)  # Σ_e ds s
        for e in range(lane, experts, WARP):
            ds = dscores[z + e] if with_scores else real(0)
            for k in range(top_k):
                if indices[choices + k] == e:
                    ds += (scale * dweights[choices + k] - mean) / divisor  # (router.7) (router.8)
            dlogits[z + e] = ds  # for the loop below, where the same lane reads it
            inner += ds * scores[z + e]
        inner = warp_sum(inner)
        for e in range(lane, experts, WARP):
            ds, s = dlogits[z + e], scores[z + e]
            if softmax:
                dlogits[z + e] = s * (ds - inner)  # (router.10)
            else:
                dlogits[z + e] = ds * s * (real(1) - s)  # (router.9)

    return router_forward, router_backward
