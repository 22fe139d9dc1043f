// The gate of the mixture of experts, from its logits (a product that cuBLAS does): scores, selection, weights; a warp a
// row. Equal scores go to the lower index, as in the reference, so that scores that are numbers choose exactly the same.
// All arrays are in `real`. Derivation: derivations/router.md.
#include "common.cuh"

struct Best {
    real value;
    int index;
};

// The order of selection: larger values first, equal ones by index.
__device__ __forceinline__ bool before(Best a, Best b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The first of values[0 … count − 1], in shared memory, that comes after `last`; the same in all lanes.
__device__ __forceinline__ Best next_best(const real* values, int count, Best last, int lane) {
    Best best = {-infinity(), count};
    for (int i = lane; i < count; i += WARP) {
        const Best x = {values[i], i};
        if (before(last, x) && before(x, best)) best = x;
    }
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2) {
        const Best x = {__shfl_xor_sync(ALL_LANES, best.value, other), __shfl_xor_sync(ALL_LANES, best.index, other)};
        if (before(x, best)) best = x;
    }
    return best;
}

// scores [rows, experts] from logits, and weights and indices [rows, top_k], top_k at most 32. `indices` are chosen here,
// or given if `replay`. softmax: else sigmoid. summed: how many of a group's best make its score. hidden: what the
// score of an expert of a group that is not kept becomes, −∞ or 0. Shared memory: 2 experts + groups, for each warp.
extern "C" __global__ void router_forward(real* scores, real* weights, int64* indices, const real* logits,
                                          const real* bias, int64 rows, int experts, int top_k, int groups,
                                          int keep_groups, int summed, real hidden, int softmax, int normalise,
                                          real scale, real epsilon, int replay) {
    extern __shared__ double memory[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    real* own = reinterpret_cast<real*>(memory) + warp * (2 * experts + groups);  // scores, without the bias
    real* biased = own + experts;
    real* group_score = biased + experts;
    const int64 row = int64(blockIdx.x) * (blockDim.x / WARP) + warp;
    if (row >= rows) return;  // whole warps: nothing below waits for another warp

    const real* z = logits + row * experts;
    real largest = -infinity(), total = 0;
    if (softmax) {
        for (int e = lane; e < experts; e += WARP) largest = z[e] > largest ? z[e] : largest;
        largest = warp_max(largest);
        for (int e = lane; e < experts; e += WARP) total += exponential(z[e] - largest);
        total = warp_sum(total);
    }
    for (int e = lane; e < experts; e += WARP) {
        const real s = softmax ? exponential(z[e] - largest) / total : sigmoid(z[e]);  // (router.2) (router.3)
        own[e] = s;
        const real b = s + bias[e];              // (router.4)
        biased[e] = b == b ? b : -infinity();    // NaN comes last
        scores[row * experts + e] = s;
    }
    __syncwarp();
    if (!replay && keep_groups < groups) {
        const int size = experts / groups;
        for (int g = lane; g < groups; g += WARP) {
            real sum = 0;
            Best last = {infinity(), -1};
            for (int k = 0; k < summed; k++) {
                Best best = {-infinity(), experts};
                for (int e = g * size; e < (g + 1) * size; e++) {
                    const Best x = {biased[e], e};
                    if (before(last, x) && before(x, best)) best = x;
                }
                if (best.index < experts) sum += best.value;
                last = best;
            }
            group_score[g] = sum;
        }
        __syncwarp();
        Best last = {infinity(), -1};
        for (int k = 0; k < keep_groups; k++) last = next_best(group_score, groups, last, lane);
        for (int e = lane; e < experts; e += WARP) {
            const Best group = {group_score[e / size], e / size};
            if (before(last, group)) biased[e] = hidden;  // (router.5)
        }
        __syncwarp();
    }
    int choice = 0;  // lane k holds the k-th
    if (replay) {
        if (lane < top_k) choice = indices[row * top_k + lane];
    } else {
        Best last = {infinity(), -1};
        for (int k = 0; k < top_k; k++) {
            last = next_best(biased, experts, last, lane);
            if (lane == k) choice = last.index < experts ? last.index : 0;
        }
    }
    const real chosen = lane < top_k ? own[choice] : real(0);
    const real sum = normalise ? warp_sum(chosen) + epsilon : real(1);
    if (lane < top_k) {
        weights[row * top_k + lane] = scale * chosen / sum;  // (router.6)
        if (!replay) indices[row * top_k + lane] = choice;
    }
}

// dlogits [rows, experts] from dweights [rows, top_k] and, if `with_scores`, dscores [rows, experts].
extern "C" __global__ void router_backward(real* dlogits, const real* dweights, const real* dscores, const real* scores,
                                           const int64* indices, int64 rows, int experts, int top_k, int softmax,
                                           int normalise, real scale, real epsilon, int with_scores) {
    const int lane = threadIdx.x % WARP;
    const int64 row = int64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    const real* s = scores + row * experts;
    const int choice = lane < top_k ? indices[row * top_k + lane] : -1;
    real d = lane < top_k ? scale * dweights[row * top_k + lane] : real(0);
    if (normalise) {
        const real chosen = lane < top_k ? s[choice] : real(0);
        const real total = warp_sum(chosen) + epsilon;
        d = (d - warp_sum(d * chosen) / total) / total;  // (router.7)
    }
    real inner = 0;  // Σ_e ds s
    for (int pass = softmax ? 0 : 1; pass < 2; pass++) {
        if (pass == 1) inner = warp_sum(inner);
        for (int first = 0; first < experts; first += WARP) {
            const int e = first + lane;
            real ds = with_scores && e < experts ? dscores[row * experts + e] : real(0);
            for (int k = 0; k < top_k; k++) {  // all lanes take part in the shuffles
                const real dk = __shfl_sync(ALL_LANES, d, k);
                if (__shfl_sync(ALL_LANES, choice, k) == e) ds += dk;  // (router.8)
            }
            if (e >= experts) continue;
            if (pass == 0) {
                inner += ds * s[e];
            } else {
                const real by_sigmoid = ds * s[e] * (1 - s[e]);  // (router.9)
                const real by_softmax = s[e] * (ds - inner);     // (router.10)
                dlogits[row * experts + e] = softmax ? by_softmax : by_sigmoid;
            }
        }
    }
}
