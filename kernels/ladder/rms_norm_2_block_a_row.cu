// RMSNorm, step 2: a block a row. Neighbouring threads read neighbouring elements, and a row has many threads; their
// sums meet in shared memory. Derivation: derivations/rms_norm.md.
#include "common.cuh"

// Grid: a block a row.
extern "C" __global__ void rms_norm_forward(storage* y, real* r, const storage* x, const storage* w, int64 rows,
                                            int width, real eps) {
    const int64 row = blockIdx.x;
    real sum = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        sum += widen(x[row * width + i]) * widen(x[row * width + i]);
    const real rms = 1 / root(finite(block_sum(sum) / width + eps));  // (rms_norm.1)
    if (threadIdx.x == 0) r[row] = rms;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[row * width + i] = narrow(widen(x[row * width + i]) * rms * widen(w[i]));  // (rms_norm.2)
}

// Grid: a block a row.
extern "C" __global__ void rms_norm_backward(storage* dx, const storage* dy, const storage* x, const storage* w,
                                             const real* r, int64 rows, int width) {
    const int64 row = blockIdx.x;
    const real rms = r[row];
    real sum = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        sum += widen(dy[row * width + i]) * widen(w[i]) * widen(x[row * width + i]) * rms;  // (rms_norm.3)
    const real mean = block_sum(sum) / width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const real n = widen(x[row * width + i]) * rms, dn = widen(dy[row * width + i]) * widen(w[i]);
        dx[row * width + i] = narrow(rms * (dn - n * mean));  // (rms_norm.4)
    }
}

// Grid: a thread a column.
extern "C" __global__ void rms_norm_weight(real* dw, const storage* dy, const storage* x, const real* r, int64 rows,
                                           int width) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width) return;
    real sum = 0;
    for (int64 row = 0; row < rows; row++) sum += widen(dy[row * width + i]) * widen(x[row * width + i]) * r[row];
    dw[i] = sum;  // (rms_norm.5)
}
