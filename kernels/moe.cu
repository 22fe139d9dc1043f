// What the mixture of experts does around its linear maps (grouped_linear.cu): copy rows to their experts, and add up
// what comes back. Slot m K + k is token m's choice k; its row among those sorted by expert is place[m K + k].
// Derivation: derivations/moe.md.
#include "common.cuh"

constexpr int AHEAD = 4;  // rows of a token that a thread has in flight together

// rows[place[m K + k]] = x[m] for all K choices of a token, whose row is read once. Grid: x a token, y a part of its row.
extern "C" __global__ void moe_permute(storage* rows, const storage* x, const int64* place, int top_k, int width) {
    const int64 token = blockIdx.x;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const bool wide = width % VECTOR == 0;
    const Chunk chunk = load_chunk<true>(x + token * width, i, width, wide);
    const int64* to = place + token * top_k;
#pragma unroll AHEAD
    for (int k = 0; k < top_k; k++) store_chunk(chunk, rows + to[k] * width, i, width, wide);  // (moe.2)
}

// y[m] = Σ_k weights[m, k] rows[place[m K + k]]. Grid: x a token, y a part of its row.
extern "C" __global__ void moe_combine(storage* y, const storage* rows, const int64* place, const real* weights, int top_k,
                                       int width) {
    const int64 token = blockIdx.x;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const bool wide = width % VECTOR == 0;
    real sum[VECTOR] = {};
    for (int k = 0; k < top_k; k += AHEAD) {
        const int64 slot = token * top_k + k;
        const storage* from[AHEAD];
        Chunk row[AHEAD];
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++) from[ahead] = rows + place[slot + min(ahead, top_k - 1 - k)] * width;
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++)
            row[ahead] = load_chunk<true>(from[ahead], i, k + ahead < top_k ? width : 0, wide);
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++) {
            if (k + ahead >= top_k) break;
            const real weight = weights[slot + ahead];
#pragma unroll
            for (int v = 0; v < VECTOR; v++) sum[v] += weight * row[ahead][v];  // (moe.5) (moe.11)
        }
    }
    store_chunk(sum, y + token * width, i, width, wide);
}

// For slot m K + k and its row place[slot]: drows[row] = weights[slot] dy[m], dweights[slot] = Σ_d dy[m, d] rows[row, d].
// Grid: x a token, y a part of its choices; a warp per choice.
extern "C" __global__ void moe_combine_backward(storage* drows, real* dweights, const storage* dy, const storage* rows,
                                                const int64* place, const real* weights, int top_k, int width) {
    const int lane = threadIdx.x % WARP, k = (blockIdx.y * blockDim.x + threadIdx.x) / WARP;
    if (k >= top_k) return;
    const bool wide = width % VECTOR == 0;
    const int64 token = blockIdx.x, slot = token * top_k + k, row = place[slot] * width;
    const real weight = weights[slot];
    real sum = 0;
    for (int i = lane * VECTOR; i < width; i += WARP * VECTOR) {
        const Chunk a = load_chunk<false>(dy + token * width, i, width, wide);
        const Chunk b = load_chunk<true>(rows + row, i, width, wide);
        real scaled[VECTOR];
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            scaled[v] = weight * a[v];  // (moe.8)
            sum += a[v] * b[v];
        }
        store_chunk(scaled, drows + row, i, width, wide);  // (moe.9)
    }
    sum = warp_sum(sum);
    if (lane == 0) dweights[slot] = sum;  // (moe.7)
}
