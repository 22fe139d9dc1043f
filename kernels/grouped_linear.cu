// The linear maps of all experts: one launch each for y, dx and dw. Rows are sorted by expert; those of expert e are
// start[e] … start[e + 1] − 1. Only the device knows these counts: the launches are the same whatever they are.
//
// A block computes a tile of ROWS × COLUMNS of the result. It is a sum over terms, DEPTH of them at a time: tiles of both
// factors pass through shared memory in STAGES stages, STAGES − 1 on their way while one is multiplied. A line of a
// factor's tile lies along the sum (ALONG: it is one row or column of the result) or across it (it is one term); with
// these two the same code does all three products. In bfloat16 they are mma.sync on tensor cores, in float32 and float64
// multiplications and additions over the same registers. Sums are float32 or wider and rounded once.
// Derivation: derivations/moe.md; each expert is an FFN, derivations/ffn.md.
//
// refimpl/kernels/grouped_linear.py defines ROWS, COLUMNS, a warp's part of them WARP_ROWS × WARP_COLUMNS, DEPTH and
// STAGES.
#include "common.cuh"

constexpr int UP = WARP_ROWS / 16, ACROSS = WARP_COLUMNS / 8;  // a warp's accumulators of 16 × 8
constexpr int THREADS = WARP * (ROWS / WARP_ROWS) * (COLUMNS / WARP_COLUMNS);

__device__ __forceinline__ int warp_row() { return threadIdx.x / WARP / (COLUMNS / WARP_COLUMNS) * WARP_ROWS; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / WARP % (COLUMNS / WARP_COLUMNS) * WARP_COLUMNS; }

// A factor [lines, width] in memory, of which tiles for LENGTH rows or columns of the result are copied. If a second pair
// of factors is multiplied and added, `second` is the array of that pair.
template <int LENGTH, bool ALONG>
struct Factor {
    static constexpr int LINES = ALONG ? LENGTH : DEPTH, NUMBERS = ALONG ? DEPTH : LENGTH;
    static constexpr int STRIDE = NUMBERS + VECTOR;  // of a line in shared memory: 8 lines in different banks
    static constexpr int SIZE = LINES * STRIDE;

    const storage *array, *second;
    int64 lines;  // what lies behind them counts as 0
    int width;
    int64 first;  // row or column of the result

    // Starts to copy the tile of terms from … from + DEPTH − 1; what is not in the array becomes 0.
    __device__ __forceinline__ void fetch(storage* tile, int64 from, bool of_second) const {
        constexpr int CHUNKS = NUMBERS / VECTOR;
        const int64 first_line = ALONG ? first : from, first_number = ALONG ? from : first;
        const bool wide = width % VECTOR == 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < LINES * CHUNKS; i += THREADS) {
            const int64 line = first_line + i / CHUNKS, number = first_number + i % CHUNKS * VECTOR;
            const bool inside = line < lines && number < width;
            const storage* source = (of_second ? second : array) + (inside ? line * width + number : 0);
            storage* to = tile + i / CHUNKS * STRIDE + i % CHUNKS * VECTOR;
            fetch_chunk(to, source, number, width, inside, wide);
        }
    }

    // Where in a tile the number lies that belongs to a row or column of the result (place) and to a term.
    static __device__ __forceinline__ int at(int place, int term) {
        return ALONG ? place * STRIDE + term : term * STRIDE + place;
    }
};

// sum += a b for a warp's rows of a and columns of b, DEPTH terms.
template <class A, class B, bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void add_product(real (&sum)[UP][ACROSS][4], const storage* a, const storage* b) {
#if defined(STORAGE_BFLOAT16)
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        unsigned x[UP][4], y[ACROSS / 2][4];
#pragma unroll
        for (int m = 0; m < UP; m++) {
            const int row = warp_row() + m * 16;
            if (A_ALONG)
                ldmatrix_x4(x[m], a + A::at(row + lane() % 16, k + lane() / 16 * 8));
            else
                ldmatrix_x4_trans(x[m], a + A::at(row + lane() / 8 % 2 * 8, k + lane() / 16 * 8 + lane() % 8));
        }
#pragma unroll
        for (int n = 0; n < ACROSS / 2; n++) {
            const int column = warp_column() + n * 16;
            if (B_ALONG)
                ldmatrix_x4(y[n], b + B::at(column + lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2 * 8));
            else
                ldmatrix_x4_trans(y[n], b + B::at(column + lane() / 16 * 8, k + lane() % 16));
        }
#pragma unroll
        for (int m = 0; m < UP; m++)
#pragma unroll
            for (int n = 0; n < ACROSS; n++)
                mma_m16n8k16(sum[m][n], x[m], y[n / 2][n % 2 * 2], y[n / 2][n % 2 * 2 + 1]);
    }
#else
#pragma unroll 1
    for (int k = 0; k < DEPTH; k++) {
        real x[UP][2], y[ACROSS][2];  // a lane's rows and columns, as mma.sync deals them out
#pragma unroll
        for (int m = 0; m < UP; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) x[m][i] = a[A::at(warp_row() + m * 16 + i * 8 + lane() / 4, k)];
#pragma unroll
        for (int n = 0; n < ACROSS; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) y[n][i] = b[B::at(warp_column() + n * 8 + lane() % 4 * 2 + i, k)];
#pragma unroll
        for (int m = 0; m < UP; m++)
#pragma unroll
            for (int n = 0; n < ACROSS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sum[m][n][i] += x[m][i / 2] * y[n][i % 2];
    }
#endif
}

extern __shared__ uint4 shared_memory[];

// sum += the product of a and b over terms first … end − 1, and that of their second arrays if there are 2 pairs.
template <bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void multiply(real (&sum)[UP][ACROSS][4], const Factor<ROWS, A_ALONG>& a,
                                         const Factor<COLUMNS, B_ALONG>& b, int pairs, int64 first, int64 end) {
    using A = Factor<ROWS, A_ALONG>;
    using B = Factor<COLUMNS, B_ALONG>;
    storage* tiles = reinterpret_cast<storage*>(shared_memory);
    const int each = static_cast<int>((end - first + DEPTH - 1) / DEPTH), steps = pairs * each;

    auto fetch = [&](int step) {
        if (step < steps) {
            const bool second = step >= each;
            const int64 from = first + static_cast<int64>(second ? step - each : step) * DEPTH;
            storage* stage = tiles + step % STAGES * (A::SIZE + B::SIZE);
            a.fetch(stage, from, second);
            b.fetch(stage + A::SIZE, from, second);
        }
        cp_async_commit();  // empty behind the last: the wait counts groups
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this stage is there for all; the one before has been read by all
        fetch(step + STAGES - 1);
        const storage* stage = tiles + step % STAGES * (A::SIZE + B::SIZE);
        add_product<A, B, A_ALONG, B_ALONG>(sum, stage, stage + A::SIZE);
    }
}

__device__ __forceinline__ void put(real* to, real x) { *to = x; }
#if defined(STORAGE_BFLOAT16)
__device__ __forceinline__ void put(storage* to, real x) { *to = narrow(x); }
#endif

// Stores the sums that are in rows first_row … end − 1 of an array [rows, width].
template <class T>
__device__ __forceinline__ void store(T* array, const real (&sum)[UP][ACROSS][4], int64 first_row, int64 end,
                                      int first_column, int width) {
#pragma unroll
    for (int m = 0; m < UP; m++)
#pragma unroll
        for (int n = 0; n < ACROSS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int64 row = first_row + warp_row() + m * 16 + i / 2 * 8 + lane() / 4;
                const int column = first_column + warp_column() + n * 8 + lane() % 4 * 2 + i % 2;
                if (row < end && column < width) put(array + row * width + column, sum[m][n][i]);
            }
}

// The rows of a block, and their expert. Tile blockIdx.y of all tiles of rows is the block's; expert e has tiles
// first_tile[e] … first_tile[e + 1] − 1, the first of which begins at row start[e]. All threads must call it.
struct Rows {
    int expert;
    int64 first, end;  // end: of the expert's rows

    __device__ __forceinline__ Rows(const int64* start, const int64* first_tile, int experts) {
        __shared__ int found;
        const int64 tile = blockIdx.y;
        for (int e = threadIdx.x; e < experts; e += THREADS)
            if (first_tile[e] <= tile && tile < first_tile[e + 1]) found = e;
        __syncthreads();
        expert = found;
        first = start[expert] + (tile - first_tile[expert]) * ROWS;
        end = start[expert + 1];
    }
};

// y[r] = w[e] x[r] for the expert e of each row. Grid: x a tile of outputs, y a tile of rows, as many as there can be
// (here and below; a block without a tile ends at once).
extern "C" __global__ void __launch_bounds__(THREADS)
grouped_linear_forward(storage* __restrict__ y, const storage* __restrict__ x, const storage* __restrict__ w,
                       const int64* __restrict__ start, const int64* __restrict__ first_tile, int experts, int inputs,
                       int outputs) {
    if (blockIdx.y >= first_tile[experts]) return;
    const Rows rows(start, first_tile, experts);
    const int column = blockIdx.x * COLUMNS;
    const int64 own = static_cast<int64>(rows.expert) * outputs * inputs;
    const Factor<ROWS, true> a = {x, nullptr, rows.end, inputs, rows.first};
    const Factor<COLUMNS, true> b = {w + own, nullptr, outputs, inputs, column};
    real sum[UP][ACROSS][4] = {};
    multiply(sum, a, b, 1, 0, inputs);
    store(y, sum, rows.first, rows.end, column, outputs);  // (moe.3)
}

// dx[r] = dy[r] w[e], plus more_dy[r] more_w[e] if there are 2 pairs. Grid: x a tile of inputs, y a tile of rows.
extern "C" __global__ void __launch_bounds__(THREADS)
grouped_linear_input(storage* __restrict__ dx, const storage* __restrict__ dy, const storage* __restrict__ w,
                     const storage* __restrict__ more_dy, const storage* __restrict__ more_w,
                     const int64* __restrict__ start, const int64* __restrict__ first_tile, int experts, int inputs,
                     int outputs, int pairs) {
    if (blockIdx.y >= first_tile[experts]) return;
    const Rows rows(start, first_tile, experts);
    const int column = blockIdx.x * COLUMNS;
    const int64 own = static_cast<int64>(rows.expert) * outputs * inputs;
    const Factor<ROWS, true> a = {dy, more_dy, rows.end, outputs, rows.first};
    const Factor<COLUMNS, false> b = {w + own, more_w + own, outputs, inputs, column};
    real sum[UP][ACROSS][4] = {};
    multiply(sum, a, b, pairs, 0, outputs);
    store(dx, sum, rows.first, rows.end, column, inputs);  // (moe.10)
}

// dw[e] = Σ_r dy[r] x[r]ᵀ over the rows of expert e; 0 if it has none. Grid: x a tile of dw, y an expert.
extern "C" __global__ void __launch_bounds__(THREADS)
grouped_linear_weight(real* __restrict__ dw, const storage* __restrict__ dy, const storage* __restrict__ x,
                      const int64* __restrict__ start, int inputs, int outputs) {
    const int across = (inputs + COLUMNS - 1) / COLUMNS, expert = blockIdx.y;
    const int row = blockIdx.x / across * ROWS, column = blockIdx.x % across * COLUMNS;
    const int64 first = start[expert], end = start[expert + 1];
    const Factor<ROWS, false> a = {dy, nullptr, end, outputs, row};
    const Factor<COLUMNS, false> b = {x, nullptr, end, inputs, column};
    real sum[UP][ACROSS][4] = {};
    multiply(sum, a, b, 1, first, end);
    store(dw + static_cast<int64>(expert) * outputs * inputs, sum, row, outputs, column, inputs);  // (moe.10)
}
