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
    store_chunk(load_chunk<false>(w + ids[row] * width, i, width, wide), y + row * width, i, width, wide);  // (embedding.1)
}

// The adjoint adds up the rows of each id. The host sorts: row k in the order of ids is order[k], and its id sorted[k].
// One id may have one row or all of them, so the order is cut into runs of `run` rows, about √rows, and a run of one id
// is summed first: whatever the ids, no sum is long and no block has much to do. Both kernels: block (32, LANES), thread
// (c, l) adds every LANES-th of its rows in chunk c, then the lanes are added. Grid: chunks / 32 for each place.
constexpr int LANES = 4;
constexpr int AHEAD = 4;  // rows that a thread loads before it adds them

__device__ __forceinline__ real in_pairs(const real (&x)[AHEAD]) { return (x[0] + x[1]) + (x[2] + x[3]); }

// sum += Σ dy[order[k]] over this lane's k, from `start` to before `end`.
__device__ __forceinline__ void add_rows(real (&sum)[VECTOR], const storage* dy, const int64* order, int64 start,
                                         int64 end, int i, int width) {
    const bool wide = width % VECTOR == 0;
    for (int64 k = start + threadIdx.y; k < end; k += LANES * AHEAD) {
        const storage* from[AHEAD];
        Chunk row[AHEAD];
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++) from[ahead] = dy + order[min(k + ahead * LANES, end - 1)] * width;
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++)
            row[ahead] = load_chunk<true>(from[ahead], i, k + ahead * LANES < end ? width : 0, wide);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum[v] += in_pairs({row[0][v], row[1][v], row[2][v], row[3][v]});
    }
}

// Lane 0 writes the sum of all lanes.
__device__ __forceinline__ void write_sum(real* to, real (&sum)[VECTOR], int i, int width) {
    sum_lanes<LANES>(sum);
#pragma unroll
    for (int v = 0; v < VECTOR; v++)
        if (threadIdx.y == 0 && i + v < width) to[i + v] = sum[v];
}

// part[n] = Σ over run n of dy, for the runs that have one id; the others stay unwritten. Places: whole runs.
extern "C" __global__ void embedding_runs(real* part, const storage* dy, const int64* order, const int64* sorted,
                                          int run, int width) {
    const int columns = (width + WARP * VECTOR - 1) / (WARP * VECTOR);
    const int64 n = blockIdx.x / columns;
    if (sorted[n * run] != sorted[n * run + run - 1]) return;
    const int i = (blockIdx.x % columns * WARP + threadIdx.x) * VECTOR;
    real sum[VECTOR] = {};
    add_rows(sum, dy, order, n * run, n * run + run, i, width);
    write_sum(part + n * width, sum, i, width);
}

// dw[id] = Σ over m with ids[m] = id of dy[m], in `real`; other rows of dw are 0 before. start: where each id that occurs
// begins. Its rows before the first whole run, its whole runs, its rows after the last one. Places: ids that occur.
extern "C" __global__ void embedding_backward(real* dw, const real* part, const storage* dy, const int64* order,
                                              const int64* sorted, const int64* start, int64 rows, int64 ids, int run,
                                              int width) {
    const int columns = (width + WARP * VECTOR - 1) / (WARP * VECTOR);
    const int64 place = blockIdx.x / columns;
    const int i = (blockIdx.x % columns * WARP + threadIdx.x) * VECTOR;
    const int64 first = start[place], end = place + 1 < ids ? start[place + 1] : rows;
    const int64 first_run = (first + run - 1) / run, end_run = end / run;
    const bool whole = first_run < end_run;
    real sum[VECTOR] = {};
    add_rows(sum, dy, order, first, whole ? first_run * run : end, i, width);
    for (int64 n = first_run + threadIdx.y; n < end_run; n += LANES * AHEAD)
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            real x[AHEAD];
#pragma unroll
            for (int ahead = 0; ahead < AHEAD; ahead++)
                x[ahead] = n + ahead * LANES < end_run && i + v < width ? part[(n + ahead * LANES) * width + i + v] : real(0);
            sum[v] += in_pairs(x);
        }
    if (whole) add_rows(sum, dy, order, end_run * run, end, i, width);
    write_sum(dw + sorted[first] * width, sum, i, width);  // (embedding.2)
}
