// Cross-entropy over large vocabularies. Forward: one pass over the logits, with a running maximum and sum (online
// softmax), a block a row. Backward: one pass that reads each logit and writes its gradient, in place if asked.
// Derivation: derivations/cross_entropy.md.
#include "common.cuh"

constexpr int BLOCK = 512;    // threads of the forward
constexpr int THREADS = 128;  // of the backward
constexpr int BATCH = 4;      // chunks of a thread that are on their way at once

// e^x. In float32 as 2^(x log₂e), five instructions for the eight of expf: wrong by (1.3 |x| + 4) 2^−24 of itself at the
// most, so for x <= 0 nowhere by more than expf is at 0, 2^−22. The logits' difference comes first: z log₂e less
// largest log₂e would be wrong by |z| 2^−24.
__device__ __forceinline__ float power(float x) { return exp2f(x * 1.44269504f); }
__device__ __forceinline__ double power(double x) { return exp(x); }
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }  // a NaN yields; the sum shows it
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

// Σ e^z as sum · e^largest, of any number of logits.
struct Total {
    real largest, sum;
};

// What to subtract from logits of which this is the largest: 0 for −∞, so that e^−∞ is 0. +∞ gives NaN, as in the
// reference.
__device__ __forceinline__ real base(real largest) { return largest == -infinity() ? real(0) : largest; }

__device__ __forceinline__ Total merge(Total a, Total b) {
    const real largest = larger(a.largest, b.largest), from = base(largest);
    return {largest, a.sum * power(a.largest - from) + b.sum * power(b.largest - from)};
}

// Of each row of logits [rows, vocabulary]: its maximum, Σ_w e^(z − largest), and chosen = log of the target's
// probability. (Both numbers are kept, not log Σ e^z: rounding that would cost p a unit for each unit of lse.)
// Grid: a block a row.
extern "C" __global__ void __launch_bounds__(BLOCK, 1)
cross_entropy_forward(real* largest_of_row, real* sum_of_row, real* chosen, const storage* logits, const int64* targets,
                      int vocabulary) {
    const int64 row = blockIdx.x;
    const storage* z = logits + row * vocabulary;
    const bool wide = vocabulary % VECTOR == 0;
    const int step = blockDim.x * VECTOR;
    Total total = {-infinity(), 0};
    for (int first = threadIdx.x * VECTOR; first < vocabulary; first += BATCH * step) {
        Chunk chunk[BATCH];
        load_chunks<true>(chunk, z, first, step, vocabulary, wide);
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
    const real largest = warp_max(total.largest);
    total = {largest, warp_sum(total.sum * power(total.largest - base(largest)))};
    __shared__ Total part[BLOCK / WARP];
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned warp = 1; warp < blockDim.x / WARP; warp++) total = merge(total, part[warp]);
        largest_of_row[row] = total.largest;
        sum_of_row[row] = total.sum;
        chosen[row] = widen(z[targets[row]]) - total.largest - logarithm(total.sum);  // (cross_entropy.1)
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
// reads its chunks before it writes them; so no load here is .nc. Grid: for each row, a thread for each BATCH chunks.
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
    const real scale = dloss[0] * weight[row], largest = largest_of_row[row], inverse = 1 / sum_of_row[row];
    const int target = targets[row];
    const bool counts = weight[row] != 0;  // what stands at the others, NaN included, does not
#pragma unroll
    for (int k = 0; k < BATCH; k++) {
        const int i = first + k * step;
        real dz[VECTOR];
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            const real p = power(chunk[k][v] - largest) * inverse;
            dz[v] = counts ? scale * (i + v == target ? p - 1 : p) : real(0);  // (cross_entropy.3)
        }
        store_chunk(dz, dlogits + row * vocabulary, i, vocabulary, wide);
    }
}
