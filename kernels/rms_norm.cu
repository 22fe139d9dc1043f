// RMSNorm: a block a row, and the row in registers, so that forward and backward read each input once.
// Derivation: derivations/rms_norm.md.
#include "common.cuh"

constexpr int HELD = (sizeof(real) == 8 ? 14 : 24) / VECTOR;  // chunks of a row that a thread holds
constexpr int BLOCK = 512;  // threads, at most: the widest row is BLOCK · HELD · VECTOR; V3's 7,168 fit in every type
// What the backward's registers are bounded by: in bfloat16 so that two blocks of V3's 320 threads, which hold a row of
// 7,168, share a multiprocessor, 96 a thread; one loads its next row while the other computes.
constexpr int BACKWARD = sizeof(storage) == 2 ? 640 : BLOCK;

// y = x r w and r = 1 / √(mean(x²) + eps). Grid: a block a row.
extern "C" __global__ void __launch_bounds__(BLOCK)
rms_norm_forward(storage* y, real* r, const storage* x, const storage* w, int width, real eps) {
    const int64 row = blockIdx.x;
    const bool wide = width % VECTOR == 0;
    const int first = threadIdx.x * VECTOR, step = blockDim.x * VECTOR;
    Chunk x_row[HELD], w_row[HELD];
    load_chunks<true>(x_row, x + row * width, first, step, width, wide);
    load_chunks<false>(w_row, w, first, step, width, wide);
    real sum = 0;
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum += x_row[k][v] * x_row[k][v];
    const real rms = 1 / root(finite(block_sum(sum) / width + eps));  // (rms_norm.1)
    if (threadIdx.x == 0) r[row] = rms;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        real chunk[VECTOR];
#pragma unroll
        for (int v = 0; v < VECTOR; v++) chunk[v] = x_row[k][v] * (rms * w_row[k][v]);  // (rms_norm.2)
        store_chunk(chunk, y + row * width, first + k * step, width, wide);
    }
}

// dx, and for each block the sum of dy ∘ n over its rows, part[block, width]. Grid: any number of blocks; each takes
// every gridDim-th row, so the sums' order depends on the grid alone.
extern "C" __global__ void __launch_bounds__(BACKWARD)
rms_norm_backward(storage* dx, real* part, const storage* dy, const storage* x, const storage* w, const real* r,
                  int64 rows, int width) {
    const bool wide = width % VECTOR == 0;
    const int first = threadIdx.x * VECTOR, step = blockDim.x * VECTOR;
    real dw[HELD][VECTOR] = {};
    for (int64 row = blockIdx.x; row < rows; row += gridDim.x) {
        const real rms = r[row];
        Chunk x_row[HELD], dy_row[HELD], w_row[HELD];
        load_chunks<true>(x_row, x + row * width, first, step, width, wide);
        load_chunks<true>(dy_row, dy + row * width, first, step, width, wide);
        load_chunks<false>(w_row, w, first, step, width, wide);
        real sum = 0;
#pragma unroll
        for (int k = 0; k < HELD; k++)
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                const real n = x_row[k][v] * rms;
                dw[k][v] += dy_row[k][v] * n;           // (rms_norm.5)
                sum += dy_row[k][v] * w_row[k][v] * n;  // (rms_norm.3)
            }
        const real mean = block_sum(sum) / width;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            real chunk[VECTOR];
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                const real dn = dy_row[k][v] * w_row[k][v];             // again
                chunk[v] = rms * (dn - x_row[k][v] * rms * mean);  // (rms_norm.4)
            }
            store_chunk(chunk, dx + row * width, first + k * step, width, wide);
        }
    }
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            const int i = first + k * step + v;
            if (i < width) part[int64(blockIdx.x) * width + i] = dw[k][v];
        }
}

// dw[i] = Σ_b part[b, i]: lane l of a column adds the parts l, l + LANES, …, then the lanes are added. Block (32, LANES).
// Grid: a block for 32 columns.
constexpr int LANES = 8;
extern "C" __global__ void rms_norm_weight(real* dw, const real* part, int parts, int width) {
    const int i = blockIdx.x * WARP + threadIdx.x;
    real sum[1] = {0};
    if (i < width) {
#pragma unroll 8
        for (int b = threadIdx.y; b < parts; b += LANES) sum[0] += part[int64(b) * width + i];
    }
    sum_lanes<LANES>(sum);
    if (threadIdx.y == 0 && i < width) dw[i] = sum[0];  // (rms_norm.5)
}
