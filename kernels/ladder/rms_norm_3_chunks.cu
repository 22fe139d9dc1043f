// RMSNorm, step 3: chunks of 16 bytes, one access for VECTOR elements. Rows are still read twice, and for dw once more.
// Derivation: derivations/rms_norm.md.
#include "common.cuh"

// Grid: a block a row.
extern "C" __global__ void rms_norm_forward(storage* y, real* r, const storage* x, const storage* w, int64 rows,
                                            int width, real eps) {
    const int64 row = blockIdx.x;
    const bool wide = width % VECTOR == 0;
    real sum = 0;
    for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
        const Chunk chunk = load_chunk<false>(x + row * width, i, width, wide);  // read again: let the caches keep it
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum += chunk[v] * chunk[v];
    }
    const real rms = 1 / root(finite(block_sum(sum) / width + eps));  // (rms_norm.1)
    if (threadIdx.x == 0) r[row] = rms;
    for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
        const Chunk chunk = load_chunk<false>(x + row * width, i, width, wide);
        const Chunk scale = load_chunk<false>(w, i, width, wide);
        real scaled[VECTOR];
#pragma unroll
        for (int v = 0; v < VECTOR; v++) scaled[v] = chunk[v] * (rms * scale[v]);  // (rms_norm.2)
        store_chunk(scaled, y + row * width, i, width, wide);
    }
}

// Grid: a block a row.
extern "C" __global__ void rms_norm_backward(storage* dx, const storage* dy, const storage* x, const storage* w,
                                             const real* r, int64 rows, int width) {
    const int64 row = blockIdx.x;
    const bool wide = width % VECTOR == 0;
    const real rms = r[row];
    real mean = 0;
    for (int pass = 0; pass < 2; pass++) {
        real sum = 0;
        for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            const Chunk own = load_chunk<false>(x + row * width, i, width, wide);
            const Chunk d = load_chunk<false>(dy + row * width, i, width, wide);
            const Chunk scale = load_chunk<false>(w, i, width, wide);
            real dx_chunk[VECTOR];
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                const real n = own[v] * rms, dn = d[v] * scale[v];  // (rms_norm.3)
                sum += dn * n;
                dx_chunk[v] = rms * (dn - n * mean);  // (rms_norm.4)
            }
            if (pass == 1) store_chunk(dx_chunk, dx + row * width, i, width, wide);
        }
        if (pass == 0) mean = block_sum(sum) / width;
    }
}

// Grid: a thread a chunk of columns.
extern "C" __global__ void rms_norm_weight(real* dw, const storage* dy, const storage* x, const real* r, int64 rows,
                                           int width) {
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (i >= width) return;
    const bool wide = width % VECTOR == 0;
    real sum[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) sum[v] = 0;
    for (int64 row = 0; row < rows; row++) {
        const Chunk own = load_chunk<true>(x + row * width, i, width, wide);
        const Chunk d = load_chunk<true>(dy + row * width, i, width, wide);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum[v] += d[v] * own[v] * r[row];  // (rms_norm.5)
    }
#pragma unroll
    for (int v = 0; v < VECTOR; v++)
        if (i + v < width) dw[i + v] = sum[v];
}
