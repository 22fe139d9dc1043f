// SwiGLU's gate, element by element: a thread a chunk of 16 bytes. Derivation: derivations/swiglu.md.
#include "common.cuh"

// y = silu(gate) ∘ up. Grid: a thread a chunk of the `size` elements.
extern "C" __global__ void swiglu_forward(storage* y, const storage* gate, const storage* up, int64 size) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    const bool wide = i + VECTOR <= size;
    real g[VECTOR], u[VECTOR];
    load_chunk<true>(g, gate, i, size, wide);
    load_chunk<true>(u, up, i, size, wide);
#pragma unroll
    for (int v = 0; v < VECTOR; v++) g[v] = g[v] * sigmoid(g[v]) * u[v];  // (swiglu.1)
    store_chunk(g, y, i, size, wide);
}

// dgate and dup from dy. Grid as above.
extern "C" __global__ void swiglu_backward(storage* dgate, storage* dup, const storage* dy, const storage* gate,
                                           const storage* up, int64 size) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    const bool wide = i + VECTOR <= size;
    real d[VECTOR], g[VECTOR], u[VECTOR];
    load_chunk<true>(d, dy, i, size, wide);
    load_chunk<true>(g, gate, i, size, wide);
    load_chunk<true>(u, up, i, size, wide);
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        const real s = sigmoid(g[v]);
        u[v] = d[v] * u[v] * (s + g[v] * s * (1 - s));  // (swiglu.2)
        d[v] = d[v] * g[v] * s;                         // (swiglu.3)
    }
    store_chunk(u, dgate, i, size, wide);
    store_chunk(d, dup, i, size, wide);
}
