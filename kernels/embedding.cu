// Embedding: rows looked up, and their adjoint, which adds up the rows of each token in a fixed order, without atomics.
// Derivation: derivations/embedding.md.
#include "common.cuh"

// y[m] = w[ids[m]], w [any, width]. Grid: a thread a chunk of each row of y.
extern "C" __global__ void embedding_gather(storage* y, const storage* w, const int64* ids, int64 rows, int width) {
    const int parts = (width + VECTOR - 1) / VECTOR;
    const int64 thread = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (thread >= rows * parts) return;
    const int64 row = thread / parts;
    const int i = thread % parts * VECTOR;
    const bool wide = width % VECTOR == 0;
    const Chunk chunk = load_chunk<false>(w + ids[row] * width, i, width, wide);
    real copy[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) copy[v] = chunk[v];
    store_chunk(copy, y + row * width, i, width, wide);  // (embedding.1)
}

// dw[id] = Σ over m with ids[m] = id of dy[m], in `real`. The host sorts: order[start[id]] … order[start[id + 1] − 1]
// are those m, rising. Block (32, LANES): thread (c, l) adds every LANES-th row of chunk c, then lane 0 adds the lanes.
// Grid: (chunks / 32, W).
constexpr int LANES = 4;
extern "C" __global__ void embedding_backward(real* dw, const storage* dy, const int64* order, const int64* start,
                                              int64 rows, int64 ids, int width) {
    __shared__ real part[LANES][VECTOR][WARP];
    const int columns = (width + WARP * VECTOR - 1) / (WARP * VECTOR);
    const int64 id = blockIdx.x / columns;
    const int i = (blockIdx.x % columns * WARP + threadIdx.x) * VECTOR;
    const bool wide = width % VECTOR == 0;
    const int64 end = id + 1 < ids ? start[id + 1] : rows;
    real sum[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) sum[v] = 0;
    for (int64 k = start[id] + threadIdx.y; k < end; k += LANES) {
        const Chunk chunk = load_chunk<true>(dy + order[k] * width, i, width, wide);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum[v] += chunk[v];
    }
#pragma unroll
    for (int v = 0; v < VECTOR; v++) part[threadIdx.y][v][threadIdx.x] = sum[v];
    __syncthreads();
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        for (int lane = 1; lane < LANES; lane++) sum[v] += part[lane][v][threadIdx.x];
        if (i + v < width) dw[id * width + i + v] = sum[v];  // (embedding.2)
    }
}
