// SwiGLU's gate, element by element: a thread a chunk of 16 bytes. Derivation: derivations/swiglu.md.
#include "common.cuh"

struct Gate {
    real open, shut;  // σ(x) and 1 − σ(x)
};

// Of a double by IEEE division.
__device__ __forceinline__ Gate gate_of(double x) {
    const real s = sigmoid(x);
    return {s, 1 - s};
}

// Of a float from z = e^−|x|, wrong by (1.3 |x| + 4) 2^-24 of itself: the one that is at least a half is 1 / (1 + z), wrong
// by 5 · 2^-24 of itself, the other z / (1 + z), by (1.3 |x| + 8) 2^-24; that is 0 where |x| > 87.3.
__device__ __forceinline__ Gate gate_of(float x) {
    const float z = ex2_approx_ftz(fabsf(x) * -1.44269504f), half = rcp_approx_ftz(1 + z), rest = z * half;
    return x < 0 ? Gate{rest, half} : Gate{half, rest};
}

// y = silu(gate) ∘ up. Grid: a thread a chunk of the `size` elements.
extern "C" __global__ void swiglu_forward(storage* y, const storage* gate, const storage* up, int64 size) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    const int left = size - i < VECTOR ? size - i : VECTOR;  // elements of this thread's chunk, none or less past the end
    const bool wide = left == VECTOR;
    const Chunk g = load_chunk<true>(gate + i, 0, left, wide), u = load_chunk<true>(up + i, 0, left, wide);
    real product[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) product[v] = g[v] * gate_of(g[v]).open * u[v];  // (swiglu.1)
    store_chunk(product, y + i, 0, left, wide);
}

// dgate and dup from dy. Grid as above.
extern "C" __global__ void swiglu_backward(storage* dgate, storage* dup, const storage* dy, const storage* gate,
                                           const storage* up, int64 size) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    const int left = size - i < VECTOR ? size - i : VECTOR;  // elements of this thread's chunk, none or less past the end
    const bool wide = left == VECTOR;
    const Chunk d = load_chunk<true>(dy + i, 0, left, wide);
    const Chunk g = load_chunk<true>(gate + i, 0, left, wide), u = load_chunk<true>(up + i, 0, left, wide);
    real dg[VECTOR], du[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        const Gate s = gate_of(g[v]);
        dg[v] = d[v] * u[v] * (s.open + g[v] * s.open * s.shut);  // (swiglu.2)
        du[v] = d[v] * g[v] * s.open;                             // (swiglu.3)
    }
    store_chunk(dg, dgate + i, 0, left, wide);
    store_chunk(du, dup + i, 0, left, wide);
}
