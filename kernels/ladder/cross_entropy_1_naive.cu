// Cross-entropy, step 1: a softmax that is kept. Three passes over the logits: maximum, sum, probabilities, and these are
// written, in `real` (rounded to bfloat16, p − 1 would have no digits left for a sure token), and read by the backward.
// ../cross_entropy.cu is the last step. Derivation: derivations/cross_entropy.md.
#include "common.cuh"

// Grid: a block a row.
extern "C" __global__ void cross_entropy_forward(real* p, real* chosen, const storage* logits, const int64* targets,
                                                 int vocabulary) {
    const storage* z = logits + int64(blockIdx.x) * vocabulary;
    real* own = p + int64(blockIdx.x) * vocabulary;
    __shared__ real part[WARP];
    real largest = -infinity(), sum = 0;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) largest = widen(z[i]) > largest ? widen(z[i]) : largest;
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = largest;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / WARP; warp++) largest = part[warp] > largest ? part[warp] : largest;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) sum += exponential(widen(z[i]) - largest);
    sum = block_sum(sum);
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) own[i] = exponential(widen(z[i]) - largest) / sum;
    if (threadIdx.x == 0)
        chosen[blockIdx.x] = widen(z[targets[blockIdx.x]]) - largest - logarithm(sum);  // (cross_entropy.1)
}

// Grid: a block a row.
extern "C" __global__ void cross_entropy_backward(storage* dlogits, const real* p, const int64* targets,
                                                  const real* weight, const real* dloss, int vocabulary) {
    const int64 first = int64(blockIdx.x) * vocabulary;
    const real scale = dloss[0] * weight[blockIdx.x];
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x)
        dlogits[first + i] = narrow(scale * (i == targets[blockIdx.x] ? p[first + i] - 1 : p[first + i]));  // (cross_entropy.3)
}
