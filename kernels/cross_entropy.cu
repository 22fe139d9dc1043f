// Cross-entropy over large vocabularies. Forward: one pass over the logits, with a running maximum and sum (online
// softmax), a block a row. Backward: one pass that reads each logit and writes its gradient, in place if asked.
// Derivation: derivations/cross_entropy.md.
#include "common.cuh"

constexpr int BLOCK = 512;

// Σ e^z as sum · e^largest, of any number of logits.
struct Total {
    real largest, sum;
};

// e^(x − y), and 1 where both are −∞; NaN where both are +∞, as in the reference.
__device__ __forceinline__ real ratio(real x, real y) {
    return x == y && x != infinity() ? real(1) : exponential(x - y);
}

__device__ __forceinline__ Total merge(Total a, Total b) {
    const real largest = b.largest > a.largest ? b.largest : a.largest;
    return {largest, a.sum * ratio(a.largest, largest) + b.sum * ratio(b.largest, largest)};
}

// Of each row of logits [rows, vocabulary]: its maximum, Σ_w e^(z − largest), and chosen = log of the target's
// probability. (Both numbers are kept, not log Σ e^z: rounding that would cost p a unit for each unit of lse.)
// Grid: a block a row.
extern "C" __global__ void __launch_bounds__(BLOCK)
cross_entropy_forward(real* largest_of_row, real* sum_of_row, real* chosen, const storage* logits, const int64* targets, int vocabulary) {
    const int64 row = blockIdx.x;
    const storage* z = logits + row * vocabulary;
    const bool wide = vocabulary % VECTOR == 0;
    Total total = {-infinity(), 0};
    for (int i = threadIdx.x * VECTOR; i < vocabulary; i += blockDim.x * VECTOR) {
        const Chunk chunk = load_chunk<true>(z, i, vocabulary, wide);
        real largest = total.largest;
#pragma unroll
        for (int v = 0; v < VECTOR; v++) largest = i + v < vocabulary && chunk[v] > largest ? chunk[v] : largest;
        real sum = total.sum * ratio(total.largest, largest);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum += i + v < vocabulary ? ratio(chunk[v], largest) : real(0);
        total = {largest, sum};
    }
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2)
        total = merge(total, {__shfl_xor_sync(ALL_LANES, total.largest, other), __shfl_xor_sync(ALL_LANES, total.sum, other)});
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

// dlogits = dloss weight (p − 1[w = target]) with p = e^(z − largest) / sum. dlogits may be logits itself: each thread reads its
// chunk before it writes it; so no load here is .nc. Grid: for each row, a thread for each chunk.
extern "C" __global__ void __launch_bounds__(BLOCK)
cross_entropy_backward(storage* dlogits, const storage* logits, const real* largest_of_row, const real* sum_of_row,
                       const int64* targets, const real* weight, const real* dloss, int vocabulary) {
    const int parts = (vocabulary - 1) / (blockDim.x * VECTOR) + 1;
    const int64 row = blockIdx.x / parts;
    const bool wide = vocabulary % VECTOR == 0;
    const int i = (blockIdx.x % parts * blockDim.x + threadIdx.x) * VECTOR;
    if (i >= vocabulary) return;
    const Chunk chunk = load_chunk<false>(logits + row * vocabulary, i, vocabulary, wide);
    const real scale = dloss[0] * weight[row], largest = largest_of_row[row], sum = sum_of_row[row];
    const int64 target = targets[row];
    real dz[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        const real p = exponential(chunk[v] - largest) / sum;
        dz[v] = scale == 0 ? real(0) : scale * (i + v == target ? p - 1 : p);  // (cross_entropy.3)
    }
    store_chunk(dz, dlogits + row * vocabulary, i, vocabulary, wide);
}
