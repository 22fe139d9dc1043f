// AdamW in one pass: four arrays read, three written (of bfloat16 four), nothing else touches memory.
// refimpl/optimizer.py is its reference. Parameters are in storage type; gradient and moments in `real`, as weight
// gradients are, and so is the master that a bfloat16 parameter is the rounding of. Other types are their own master:
// the host passes one array twice, and it is written once.
#include "common.cuh"

constexpr int EACH = 16 / sizeof(real);  // elements of a thread: 16 bytes of each array in `real`

// Elements i to i + EACH − 1, 0 from `size` on. wide: all are below it, and lie at a multiple of 16 bytes.
__device__ __forceinline__ void load(real (&x)[EACH], const real* from, int64 i, int64 size, bool wide) {
    if (wide) {
        const Chunk chunk = ld_global_v4(from + i);
        memcpy(x, chunk.word, sizeof x);
    } else {
#pragma unroll
        for (int k = 0; k < EACH; k++) x[k] = i + k < size ? from[i + k] : real(0);
    }
}

__device__ __forceinline__ void store(real* to, const real (&x)[EACH], int64 i, int64 size, bool wide) {
    if (wide) {
        Chunk chunk;
        memcpy(chunk.word, x, sizeof x);
        st_global_v4(to + i, chunk);
    } else {
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (i + k < size) to[i + k] = x[k];
    }
}

// Grid: a thread for EACH elements. rest1 = 1 − β1 and rest2 = 1 − β2; correct1 = 1 − β1^step and correct2 likewise.
extern "C" __global__ void adamw_update(storage* p, real* m, real* v, const real* g, int64 size, real rest1, real rest2,
                                        real correct1, real correct2, real epsilon, real decay, real learning_rate,
                                        real* master) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * EACH;
    if (i >= size) return;
    const auto places = reinterpret_cast<size_t>(p) | reinterpret_cast<size_t>(m) | reinterpret_cast<size_t>(v) |
                        reinterpret_cast<size_t>(g) | reinterpret_cast<size_t>(master);
    const bool wide = places % 16 == 0 && i + EACH <= size;
    real gradient[EACH], mean[EACH], square[EACH], value[EACH];
    load(gradient, g, i, size, wide);
    load(mean, m, i, size, wide);
    load(square, v, i, size, wide);
    load(value, master, i, size, wide);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        mean[k] += rest1 * (gradient[k] - mean[k]);
        square[k] = finite(square[k] + rest2 * (gradient[k] * gradient[k] - square[k]));  // m / ∞ would be no step, unseen
        const real step = mean[k] / correct1 / (root(square[k] / correct2) + epsilon);
        value[k] -= learning_rate * (step + decay * value[k]);
    }
    store(m, mean, i, size, wide);
    store(v, square, i, size, wide);
    store(master, value, i, size, wide);
#if defined(STORAGE_BFLOAT16)
    if (wide) {
        *reinterpret_cast<uint2*>(p + i) = {cvt_rn_bf16x2(value[1], value[0]), cvt_rn_bf16x2(value[3], value[2])};
    } else {
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (i + k < size) p[i + k] = narrow(value[k]);
    }
#endif
}
