// Cross-entropy, step 3: maximum and sum in one pass, the sum scaled down whenever the maximum grows (online softmax).
// Derivation: derivations/cross_entropy.md.
#include "common.cuh"

struct Total {
    real largest, sum;
};

__device__ __forceinline__ Total merge(Total a, Total b) {
    const real largest = b.largest > a.largest ? b.largest : a.largest;
    if (largest == -infinity()) return a;
    return {largest, a.sum * exponential(a.largest - largest) + b.sum * exponential(b.largest - largest)};
}

// Grid: a block a row.
extern "C" __global__ void cross_entropy_forward(real* largest_of_row, real* sum_of_row, real* chosen,
                                                 const storage* logits, const int64* targets, int vocabulary) {
    const storage* z = logits + int64(blockIdx.x) * vocabulary;
    __shared__ Total part[WARP];
    Total total = {-infinity(), 0};
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) total = merge(total, {widen(z[i]), 1});
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2)
        total = merge(total, {__shfl_xor_sync(ALL_LANES, total.largest, other), __shfl_xor_sync(ALL_LANES, total.sum, other)});
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned warp = 1; warp < blockDim.x / WARP; warp++) total = merge(total, part[warp]);
    largest_of_row[blockIdx.x] = total.largest;
    sum_of_row[blockIdx.x] = total.sum;
    chosen[blockIdx.x] = widen(z[targets[blockIdx.x]]) - total.largest - logarithm(total.sum);  // (cross_entropy.1)
}

// Grid: a block a row.
extern "C" __global__ void cross_entropy_backward(storage* dlogits, const storage* logits, const real* largest_of_row,
                                                  const real* sum_of_row, const int64* targets, const real* weight,
                                                  const real* dloss, int vocabulary) {
    const int64 first = int64(blockIdx.x) * vocabulary;
    const real scale = dloss[0] * weight[blockIdx.x], largest = largest_of_row[blockIdx.x], sum = sum_of_row[blockIdx.x];
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        const real p = exponential(widen(logits[first + i]) - largest) / sum;
        dlogits[first + i] = narrow(scale * (i == targets[blockIdx.x] ? p - 1 : p));  // (cross_entropy.3)
    }
}
