// The gate of the mixture of experts, from its logits (a product that cuBLAS does): scores, selection, weights; a warp a
// row. Equal scores go to the lower index, as in the reference, so that scores that are numbers choose exactly the same.
// All arrays are in `real`. Derivation: derivations/router.md.
#include "common.cuh"

// The order of selection as integers: a larger number has a larger key. NaN, which the reference's sort puts last, has
// the least, and TAKEN is below all. There is no −0: scores are at least +0, and x + 0, where x is −0 too, is +0.
#if defined(STORAGE_FLOAT64)
typedef unsigned long long Key;
__device__ __forceinline__ Key bits_of(real x) { return __double_as_longlong(x); }
__device__ __forceinline__ real of_bits(Key bits) { return __longlong_as_double(bits); }
#else
typedef unsigned Key;
__device__ __forceinline__ Key bits_of(real x) { return __float_as_uint(x); }
__device__ __forceinline__ real of_bits(Key bits) { return __uint_as_float(bits); }
#endif
constexpr Key TAKEN = 0, NOT_A_NUMBER = 1, SIGN = Key(1) << (8 * sizeof(Key) - 1);

__device__ __forceinline__ Key key_of(real x) {
    const Key bits = bits_of(x);
    return x != x ? NOT_A_NUMBER : bits & SIGN ? ~bits : bits | SIGN;
}

__device__ __forceinline__ real number_of(Key key) { return of_bits(key & SIGN ? key & ~SIGN : ~key); }

// The largest of a warp; 64 bits as their upper halves, then the lower ones of those whose upper half is the largest.
__device__ __forceinline__ unsigned warp_largest(unsigned x) { return __reduce_max_sync(ALL_LANES, x); }
__device__ __forceinline__ unsigned long long warp_largest(unsigned long long x) {
    const unsigned upper = x >> 32, largest = warp_largest(upper);
    const unsigned lower = warp_largest(upper == largest ? static_cast<unsigned>(x) : 0u);
    return static_cast<unsigned long long>(largest) << 32 | lower;
}

struct Best {
    Key key;
    int place;
};

__device__ __forceinline__ bool before(Best a, Best b) { return a.key > b.key || (a.key == b.key && a.place < b.place); }

// The best of a lane's own keys[0], keys[32], …, the first of equal ones.
__device__ __forceinline__ Best best_of_lane(const Key* keys, int slots) {
    Best best = {TAKEN, 0};
#pragma unroll 8
    for (int j = 0; j < slots; j++)
        if (keys[j * WARP] > best.key) best = {keys[j * WARP], j};
    return best;
}

// scores [rows, experts] from logits, and weights and indices [rows, top_k], top_k and groups at most 32. `indices` are
// chosen here, or given if `replay`. softmax: else sigmoid. summed: how many of a group's best make its score, at most its
// size. hidden: what the score of an expert of a group that is not kept becomes, −∞ or 0. A group has `stride` lanes, a
// power of two, of which each takes every stride-th of its experts, in slots of shared memory of its own: no two lanes'
// slots share a bank. Shared memory: 64 numbers for each slot, for each warp.
extern "C" __global__ void router_forward(real* scores, real* weights, int64* indices, const real* __restrict__ logits,
                                          const real* __restrict__ bias, int64 rows, int experts, int top_k, int groups,
                                          int keep_groups, int summed, real hidden, int softmax, int normalise,
                                          real scale, real epsilon, int replay) {
    extern __shared__ double memory[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64 row = int64(blockIdx.x) * (blockDim.x / WARP) + warp;
    if (row >= rows) return;  // whole warps: nothing below waits for another warp
    int shift = 5;
    while (groups << shift > WARP) shift--;
    const int stride = 1 << shift, size = experts / groups, most = (size + stride - 1) >> shift;
    const int group = lane >> shift, part = lane & (stride - 1), first = group * size + part;
    const int slots = group < groups ? (size - part + stride - 1) >> shift : 0;
    Key* keys = reinterpret_cast<Key*>(memory) + warp * 2 * most * WARP + lane;
    Key* spare = keys + most * WARP;  // for groups to take from

    const real* z = logits + row * experts;
    real* s = scores + row * experts;
#pragma unroll 8
    for (int j = 0; j < slots; j++) {  // loads alone, so that none waits for another
        spare[j * WARP] = bits_of(z[first + (j << shift)]);
        keys[j * WARP] = bits_of(bias[first + (j << shift)]);
    }
    real largest = -infinity(), total = 0;
    if (softmax) {
        for (int j = 0; j < slots; j++) {
            const real x = of_bits(spare[j * WARP]);
            largest = x > largest ? x : largest;
        }
        largest = warp_max(largest);
        for (int j = 0; j < slots; j++) total += exponential(of_bits(spare[j * WARP]) - largest);
        total = warp_sum(total);
    }
    for (int j = 0; j < slots; j++) {
        const real x = of_bits(spare[j * WARP]), score = softmax ? exponential(x - largest) / total : sigmoid(x);
        s[first + (j << shift)] = score;                                             // (router.2) (router.3)
        keys[j * WARP] = spare[j * WARP] = key_of(score + of_bits(keys[j * WARP]));  // (router.4)
    }
    __syncwarp();  // a lane reads scores below that others wrote
    if (!replay && keep_groups < groups) {
        real sum = 0;
        for (int k = 0; k < summed; k++) {
            const Best own = best_of_lane(spare, slots);
            Best best = {own.key, lane};  // which of equal ones is taken does not change the sum
            for (int other = stride / 2; other > 0; other /= 2) {
                const Best x = {__shfl_xor_sync(ALL_LANES, best.key, other), __shfl_xor_sync(ALL_LANES, best.place, other)};
                if (before(x, best)) best = x;
            }
            if (best.place == lane && slots > 0) spare[own.place * WARP] = TAKEN;
            sum += number_of(best.key);
        }
        const Key own = key_of(sum);
        int rank = 0;
        for (int g = 0; g < groups; g++) {
            const Key other = __shfl_sync(ALL_LANES, own, g * stride);
            if (other > own || (other == own && g < group)) rank++;
        }
        if (rank >= keep_groups)
            for (int j = 0; j < slots; j++) keys[j * WARP] = key_of(hidden);  // (router.5)
    }
    int choice = 0;  // lane k holds the k-th
    if (replay) {
        if (lane < top_k) choice = indices[row * top_k + lane];
    } else {
        for (int k = 0; k < top_k; k++) {
            const Best own = best_of_lane(keys, slots);
            const bool among = own.key == warp_largest(own.key);
            const int mine = first + (own.place << shift), best = __reduce_min_sync(ALL_LANES, among ? mine : experts);
            if (among && mine == best) keys[own.place * WARP] = TAKEN;
            if (lane == k) choice = best;
        }
    }
    const real chosen = lane < top_k ? s[choice] : real(0);
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
