// RMSNorm, step 1: the equations as they stand; a thread a row, and for dw a thread a column. Neighbouring threads read
// addresses a whole row apart. ../rms_norm.cu is the last step. Derivation: derivations/rms_norm.md.
#include "common.cuh"

// Grid: a thread a row.
extern "C" __global__ void rms_norm_forward(storage* y, real* r, const storage* x, const storage* w, int64 rows,
                                            int width, real eps) {
    const int64 row = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    real sum = 0;
    for (int i = 0; i < width; i++) sum += widen(x[row * width + i]) * widen(x[row * width + i]);
    const real rms = 1 / root(finite(sum / width + eps));  // (rms_norm.1)
    r[row] = rms;
    for (int i = 0; i < width; i++) y[row * width + i] = narrow(widen(x[row * width + i]) * rms * widen(w[i]));  // (rms_norm.2)
}

// Grid: a thread a row.
extern "C" __global__ void rms_norm_backward(storage* dx, const storage* dy, const storage* x, const storage* w,
                                             const real* r, int64 rows, int width) {
    const int64 row = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const real rms = r[row];
    real sum = 0;
    for (int i = 0; i < width; i++)
        sum += widen(dy[row * width + i]) * widen(w[i]) * widen(x[row * width + i]) * rms;  // (rms_norm.3)
    const real mean = sum / width;
    for (int i = 0; i < width; i++) {
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
