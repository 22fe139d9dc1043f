// SwiGLU's gate, element by element: a thread a chunk of 16 bytes. Derivation: derivations/swiglu.md.
#include "common.cuh"

// y = silu(gate) ∘ up. Grid: a thread a chunk of the `size` elements.
extern "C" __global__ void swiglu_forward(storage* y, const storage* gate, const storage* up, int64 size) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    const int left = size - i < VECTOR ? size - i : VECTOR;  // elements of this thread's chunk, none or less past the end
    const bool wide = left == VECTOR;
    const Chunk g = load_chunk<true>(gate + i, 0, left, wide), u = load_chunk<true>(up + i, 0, left, wide);
    real product[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) product[v] = g[v] * sigmoid(g[v]) * u[v];  // (swiglu.1)
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
        const real s = sigmoid(g[v]);
        dg[v] = d[v] * u[v] * (s + g[v] * s * (1 - s));  // (swiglu.2)
        du[v] = d[v] * g[v] * s;                         // (swiglu.3)
    }
    store_chunk(dg, dgate + i, 0, left, wide);
    store_chunk(du, dup + i, 0, left, wide);
}
