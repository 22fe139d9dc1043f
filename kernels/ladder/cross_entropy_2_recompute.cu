// Cross-entropy, step 2: nothing of the logits' size is kept. The forward saves maximum and sum of each row, and the
// backward computes the probabilities again. Derivation: derivations/cross_entropy.md.
#include "common.cuh"

// Grid: a block a row.
extern "C" __global__ void cross_entropy_forward(real* largest_of_row, real* sum_of_row, real* chosen,
                                                 const storage* logits, const int64* targets, int vocabulary) {
    const storage* z = logits + int64(blockIdx.x) * vocabulary;
    __shared__ real part[WARP];
    real largest = -infinity(), sum = 0;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) largest = widen(z[i]) > largest ? widen(z[i]) : largest;
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = largest;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / WARP; warp++) largest = part[warp] > largest ? part[warp] : largest;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) sum += exponential(widen(z[i]) - largest);
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    largest_of_row[blockIdx.x] = largest;
    sum_of_row[blockIdx.x] = sum;
    chosen[blockIdx.x] = widen(z[targets[blockIdx.x]]) - largest - logarithm(sum);  // (cross_entropy.1)
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
