// Cross-entropy over large vocabularies. Forward: one pass over the logits with a running maximum and sum (online
// softmax), a block per row. Backward: one pass that reads each logit and writes its gradient. In place: both in one
// kernel, for a caller who knows dloss; the second read of a row comes from the caches.
// Derivation: derivations/cross_entropy.md.
#include "common.cuh"

constexpr int BLOCK = sizeof(real) == 8 ? 512 : 1024;  // threads of a row's block, at most
constexpr int THREADS = 128;  // of the backward
constexpr int BATCH = 4;      // chunks of a thread that are on their way at once

// e^x. In float32 it is 2^(x log₂e): two instructions where expf has eight. The relative error is at most
// (1.3 |x| + 4) 2^−24, so for x <= 0 the absolute one is at most 2^−22, that at 0; below −87.3 the result is 0, beside a
// sum of at least 1. Subtract the largest logit before: z log₂e − largest log₂e would err by |z| 2^−24.
__device__ __forceinline__ float power(float x) { return ex2_approx_ftz(x * 1.44269504f); }
__device__ __forceinline__ double power(double x) { return exp(x); }
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }  // a NaN yields; the sum shows it
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

// Σ e^z of some logits, as sum · e^largest.
struct Total {
    real largest, sum;
};

// What to subtract from logits whose largest is this: 0 for −∞, so that e^−∞ is 0. +∞ gives NaN, as in the reference.
__device__ __forceinline__ real base(real largest) { return largest == -infinity() ? real(0) : largest; }

// The total of all that the block's threads have; each gets the same bits. All threads must call it, once.
__device__ __forceinline__ Total merge(Total own) {
    __shared__ Total part[BLOCK / WARP];
    const unsigned lane = threadIdx.x % WARP;
    real largest = warp_max(own.largest);
    own = {largest, warp_sum(own.sum * power(own.largest - base(largest)))};
    if (lane == 0) part[threadIdx.x / WARP] = own;
    __syncthreads();
    own = lane < blockDim.x / WARP ? part[lane] : Total{-infinity(), 0};
    largest = warp_max(own.largest);
    return {largest, warp_sum(own.sum * power(own.largest - base(largest)))};
}

// The total of the row z, by all threads of the block. STREAM: nothing writes z while the kernel runs.
template <bool STREAM>
__device__ __forceinline__ Total total_of(const storage* z, int vocabulary, bool wide) {
    const int step = blockDim.x * VECTOR;
    Total total = {-infinity(), 0};
    for (int first = threadIdx.x * VECTOR; first < vocabulary; first += BATCH * step) {
        Chunk chunk[BATCH];
        load_chunks<STREAM>(chunk, z, first, step, vocabulary, wide);
        if (first + (BATCH - 1) * step + VECTOR > vocabulary)  // the row ends here: past it stands −∞, whose e^z is 0
#pragma unroll
            for (int n = 0; n < BATCH * VECTOR; n++)
                if (first + n / VECTOR * step + n % VECTOR >= vocabulary) chunk[n / VECTOR].set(n % VECTOR, narrow(-infinity()));
        real largest = total.largest;
#pragma unroll
        for (int n = 0; n < BATCH * VECTOR; n++) largest = larger(largest, chunk[n / VECTOR][n % VECTOR]);
        const real from = base(largest);
        real sum = total.sum * power(total.largest - from);  // one rescaling for the batch
#pragma unroll
        for (int n = 0; n < BATCH * VECTOR; n++) sum += power(chunk[n / VECTOR][n % VECTOR] - from);
        total = {largest, sum};
    }
    return merge(total);
}

// log of the probability of a logit z.
__device__ __forceinline__ real log_probability(real z, Total total) {
    return z - total.largest - logarithm(total.sum);  // (cross_entropy.1)
}

// What a row's gradient needs. It is scale (p − 1[w = target]) with p = e^(z − largest) inverse, and 0 in a row that
// does not count, whatever its logits are, NaN included.
struct Row {
    real scale, largest, inverse;
    int target;
    bool counts;
};

__device__ __forceinline__ void store_gradient(storage* dz_row, const Chunk (&chunk)[BATCH], Row row, int first, int step,
                                               int vocabulary, bool wide) {
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
        const int i = first + k * step;
        real dz[VECTOR];
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            const real p = power(chunk[k][v] - row.largest) * row.inverse;
            dz[v] = row.counts ? row.scale * (i + v == row.target ? p - 1 : p) : real(0);  // (cross_entropy.3)
        }
        store_chunk(dz, dz_row, i, vocabulary, wide);
    }
}

// For each row of logits [rows, vocabulary]: its maximum, Σ_w e^(z − largest), and chosen = log of the target's
// probability. (The first two are kept rather than log Σ e^z: its rounding would be a relative error of p.)
// Grid: a block per row.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
cross_entropy_forward(real* largest_of_row, real* sum_of_row, real* chosen, const storage* logits, const int64* targets,
                      int vocabulary) {
    const int64 row = blockIdx.x;
    const storage* z = logits + row * vocabulary;
    const Total total = total_of<true>(z, vocabulary, vocabulary % VECTOR == 0);
    if (threadIdx.x == 0) {
        largest_of_row[row] = total.largest;
        sum_of_row[row] = total.sum;
        chosen[row] = log_probability(widen(z[targets[row]]), total);
    }
}

// loss = −Σ_row weight chosen, rows of weight 0 left out. Grid: one block.
extern "C" __global__ void cross_entropy_loss(real* loss, const real* chosen, const real* weight, int64 rows) {
    real sum = 0;
    for (int64 row = threadIdx.x; row < rows; row += blockDim.x)
        if (weight[row] != 0) sum += weight[row] * chosen[row];
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[0] = -sum;  // (cross_entropy.2)
}

// dlogits = dloss weight (p − 1[w = target]) with p = e^(z − largest) / sum. dlogits may be logits itself: each thread
// reads its chunks before it writes them, so no load here is .nc. Grid: blocks of THREADS · BATCH chunks of a row.
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_backward(storage* dlogits, const storage* logits, const real* largest_of_row, const real* sum_of_row,
                       const int64* targets, const real* weight, const real* dloss, int vocabulary) {
    constexpr int step = THREADS * VECTOR;
    const int parts = (vocabulary - 1) / (BATCH * step) + 1;
    const int64 row = blockIdx.x / parts;
    const bool wide = vocabulary % VECTOR == 0;
    const int first = blockIdx.x % parts * BATCH * step + threadIdx.x * VECTOR;
    if (first >= vocabulary) return;
    Chunk chunk[BATCH];
    load_chunks<false>(chunk, logits + row * vocabulary, first, step, vocabulary, wide);
    const Row own = {dloss[0] * weight[row], largest_of_row[row], 1 / sum_of_row[row], static_cast<int>(targets[row]),
                     weight[row] != 0};
    store_gradient(dlogits + row * vocabulary, chunk, own, first, step, vocabulary, wide);
}

// The forward's chosen, and the gradient written over the logits. A thread writes only what it has read itself, after all
// have read the row. It begins with what was read last, which lies in the nearest cache. Grid: a block per row.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
cross_entropy_in_place(storage* logits, real* chosen, const int64* targets, const real* weight, const real* dloss,
                       int vocabulary) {
    const int64 row = blockIdx.x;
    storage* z = logits + row * vocabulary;
    const bool wide = vocabulary % VECTOR == 0;
    const int target = targets[row], step = blockDim.x * VECTOR;
    const real own = widen(z[target]);
    const Total total = total_of<false>(z, vocabulary, wide);
    if (threadIdx.x == 0) chosen[row] = log_probability(own, total);
    const Row of_row = {dloss[0] * weight[row], total.largest, 1 / total.sum, target, weight[row] != 0};
    const int batches = (vocabulary - 1) / (BATCH * step) + 1;
    for (int first = (batches - 1) * BATCH * step + threadIdx.x * VECTOR; first >= 0; first -= BATCH * step) {
        Chunk chunk[BATCH];
        load_chunks<false>(chunk, z, first, step, vocabulary, wide);
        store_gradient(z, chunk, of_row, first, step, vocabulary, wide);
    }
}
