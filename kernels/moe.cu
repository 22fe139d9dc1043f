// What the mixture of experts does around its dense products: send rows to their experts, and add up what comes back.
// Row r of the expert order belongs to slot order[r] = m K + k, token m's k-th choice; place is the inverse of order.
// Derivation: derivations/moe.md.
#include "common.cuh"

constexpr int AHEAD = 4;  // rows that a thread of moe_combine loads before it adds them

// rows[r] = x[order[r] / K], or `scale[order[r]]` times that if scaled. Grid: x a row, y a part of it, a thread a chunk; so
// blocks that run together read one part of rows, which L2 can hold until other experts read it again.
extern "C" __global__ void moe_permute(storage* rows, const storage* x, const int64* order, const real* scale, int top_k,
                                       int width, int scaled) {
    const int64 row = blockIdx.x, slot = order[row];
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const bool wide = width % VECTOR == 0;
    const real factor = scaled ? scale[slot] : real(1);
    const Chunk chunk = load_chunk<false>(x + slot / top_k * width, i, width, wide);  // read K times: let the caches keep it
    real scaled_x[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) scaled_x[v] = chunk[v] * factor;  // (moe.8) with a factor
    store_chunk(scaled_x, rows + row * width, i, width, wide);  // (moe.2) (moe.9)
}

// y[m] = Σ_k weights[m, k] rows[place[m K + k]], weights 1 unless weighted. Grid: x a token, y a part of its row.
extern "C" __global__ void moe_combine(storage* y, const storage* rows, const int64* place, const real* weights, int top_k,
                                       int width, int weighted) {
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
            const real weight = weighted ? weights[slot + ahead] : real(1);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) sum[v] += weight * row[ahead][v];  // (moe.5) (moe.11)
        }
    }
    store_chunk(sum, y + token * width, i, width, wide);
}

// dweights[slot] = Σ_d dy[m, d] rows[place[slot], d]. Grid: x a token, y a part of its choices, a warp a choice.
extern "C" __global__ void moe_weight_gradient(real* dweights, const storage* dy, const storage* rows,
                                               const int64* place, int top_k, int width) {
    const int lane = threadIdx.x % WARP, k = (blockIdx.y * blockDim.x + threadIdx.x) / WARP;
    if (k >= top_k) return;
    const bool wide = width % VECTOR == 0;
    const int64 token = blockIdx.x, slot = token * top_k + k;
    const storage* of_token = dy + token * width;
    const storage* of_slot = rows + place[slot] * width;
    real sum = 0;
    for (int i = lane * VECTOR; i < width; i += WARP * VECTOR) {
        const Chunk a = load_chunk<false>(of_token, i, width, wide), b = load_chunk<true>(of_slot, i, width, wide);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum += a[v] * b[v];
    }
    sum = warp_sum(sum);
    if (lane == 0) dweights[slot] = sum;  // (moe.7)
}
