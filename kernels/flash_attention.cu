// Flash attention: o = softmax(scale · q kᵀ + mask) v and its gradients, in memory linear in the sequence.
//
// A warp owns 16 rows; a block's warps share tiles of the other side, which pass through shared memory. Everything is
// made of two products of such tiles: `add_scores` sums along rows of both, `add_mixed` mixes rows by weights that lie
// in registers as the first product left them. In bfloat16 both are mma.sync on tensor cores, in float32 and float64
// multiplications and additions over the same registers. Tags: derivations/flash_attention.md.
//
// refimpl/kernels/flash_attention.py defines KEY_WIDTH and VALUE_WIDTH, multiples of 16 (the arrays' widths may be less:
// what is missing is 0), and the tiles: FORWARD_WARPS, FORWARD_KEYS, BACKWARD_WARPS, BACKWARD_ROWS.
#include "common.cuh"

constexpr int OWN = 16;  // rows of a warp

// A row of a tile in shared memory: 16 bytes longer than its numbers, so that the same columns of 8 rows lie in
// different banks.
__device__ constexpr int stride(int width) { return width + VECTOR; }

// sum += a bᵀ for 16 rows of a and 8 · TILES rows of b, all of WIDTH numbers in shared memory.
template <int WIDTH, int TILES>
__device__ __forceinline__ void add_scores(real (&sum)[TILES][4], const storage* a, const storage* b) {
#if defined(STORAGE_BFLOAT16)
#pragma unroll
    for (int i = 0; i < WIDTH; i += 16) {
        unsigned x[4];
        ldmatrix_x4(x, a + lane() % 16 * stride(WIDTH) + i + lane() / 16 * 8);
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            unsigned y[4];
            ldmatrix_x4(y, b + (n * 8 + lane() / 16 * 8 + lane() % 8) * stride(WIDTH) + i + lane() / 8 % 2 * 8);
            mma_m16n8k16(sum[n], x, y[0], y[1]);
            mma_m16n8k16(sum[n + 1], x, y[2], y[3]);
        }
    }
#else
#pragma unroll 1
    for (int i = 0; i < WIDTH; i += VECTOR) {
        const Chunk upper = ld_shared_v4(a + row_of(0) * stride(WIDTH) + i);
        const Chunk lower = ld_shared_v4(a + row_of(2) * stride(WIDTH) + i);
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int side = 0; side < 2; side++) {
                const Chunk y = ld_shared_v4(b + (n * 8 + column_of(side)) * stride(WIDTH) + i);
                real of_upper = 0, of_lower = 0;  // a chunk's sum first: the long one is rounded less often
#pragma unroll
                for (int v = 0; v < VECTOR; v++) {
                    of_upper += upper[v] * y[v];
                    of_lower += lower[v] * y[v];
                }
                sum[n][side] += of_upper;
                sum[n][2 + side] += of_lower;
            }
    }
#endif
}

// sum += p b for 16 × 8 · TILES weights p in registers and 8 · TILES rows b of WIDTH numbers in shared memory.
template <int WIDTH, int TILES>
__device__ __forceinline__ void add_mixed(real (&sum)[WIDTH / 8][4], const real (&p)[TILES][4], const storage* b) {
#if defined(STORAGE_BFLOAT16)
#pragma unroll
    for (int k = 0; k < TILES; k += 2) {  // two accumulators side by side are the first operand of a product
        const unsigned x[4] = {cvt_rn_bf16x2(p[k][1], p[k][0]), cvt_rn_bf16x2(p[k][3], p[k][2]),
                               cvt_rn_bf16x2(p[k + 1][1], p[k + 1][0]), cvt_rn_bf16x2(p[k + 1][3], p[k + 1][2])};
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n += 2) {
            unsigned y[4];
            ldmatrix_x4_trans(y, b + (k * 8 + lane() % 16) * stride(WIDTH) + n * 8 + lane() / 16 * 8);
            mma_m16n8k16(sum[n], x, y[0], y[1]);
            mma_m16n8k16(sum[n + 1], x, y[2], y[3]);
        }
    }
#else
#pragma unroll
    for (int k = 0; k < TILES; k++)
#pragma unroll
        for (int j = 0; j < 8; j++) {  // the four lanes of a row hold its weights
            const real upper = __shfl_sync(ALL_LANES, p[k][j % 2], lane() / 4 * 4 + j / 2);
            const real lower = __shfl_sync(ALL_LANES, p[k][2 + j % 2], lane() / 4 * 4 + j / 2);
            const storage* y = b + (k * 8 + j) * stride(WIDTH) + column_of(0);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    sum[n][side] += upper * y[n * 8 + side];
                    sum[n][2 + side] += lower * y[n * 8 + side];
                }
        }
#endif
}

// One head of an array [B, positions, heads, width].
struct Head {
    int batch, head, positions, heads, width;

    // Where the numbers of a position begin. Computed when needed: kept, it would take registers.
    __device__ __forceinline__ int64 at(int position) const {
        return ((static_cast<int64>(batch) * positions + position) * heads + head) * width;
    }
};

// Starts to copy rows first … first + ROWS − 1 into a tile; what is not in the array becomes 0. It is there after a
// cp_async_wait and a barrier. All of a block's threads must call it.
template <int WIDTH, int ROWS, int THREADS>
__device__ __forceinline__ void fetch(storage* tile, const storage* array, const Head& head, int first) {
    constexpr int CHUNKS = WIDTH / VECTOR;
    const bool wide = head.width % VECTOR == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * VECTOR;
        const bool inside = first + row < head.positions && column < head.width;
        const storage* from = array + (inside ? head.at(first + row) + column : 0);
        storage* to = tile + row * stride(WIDTH) + column;
        fetch_chunk(to, from, column, head.width, inside, wide);
    }
}

// Stores the rows of a block's accumulators that are in an array [B, positions, heads, width].
template <int WIDTH>
__device__ __forceinline__ void store(storage* array, const real (&sum)[WIDTH / 8][4], const Head& head, int first) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = first + row_of(i), column = n * 8 + column_of(i);
            if (row < head.positions && column < head.width)
                array[head.at(row) + column] = narrow(sum[n][i]);
        }
}

template <int TILES>
__device__ __forceinline__ void clear(real (&sum)[TILES][4]) {
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[n][i] = 0;
}

// Who sees whom.
struct Mask {
    const unsigned char* key_mask;  // [S], or nothing
    const int64* segments;          // [S], or nothing
    int queries, keys, causal, masked;

    __device__ __forceinline__ int position(int t) const { return t + keys - queries; }

    // By the order of positions: the last key that a query sees, the first query that sees a key.
    __device__ __forceinline__ int last_key(int t) const {
        return t >= queries ? -1 : causal ? position(t) : keys - 1;
    }
    __device__ __forceinline__ int first_query(int s) const {
        return s >= keys ? queries : causal && s > position(0) ? s - position(0) : 0;
    }

    // By the masks.
    __device__ __forceinline__ bool shows(int t, int s) const {
        return !masked || (key_mask[s] && segments[s] == segments[position(t) < 0 ? 0 : position(t)]);
    }

    // Each of so many queries sees each of so many keys.
    __device__ __forceinline__ bool shows_all(int t, int some_queries, int s, int some_keys) const {
        return !masked && t + some_queries <= queries && s + some_keys <= keys &&
               (!causal || s + some_keys - 1 <= position(t));
    }

    // Behind the last key that one of the queries up to t − 1 sees by the order alone.
    __device__ __forceinline__ int end(int t) const {
        return causal ? position(t < queries ? t : queries) : keys;
    }
};

// Over the four lanes that hold a row.
__device__ __forceinline__ real row_sum_of(real x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

__device__ __forceinline__ real row_max_of(real x) {
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
        const real y = __shfl_xor_sync(ALL_LANES, x, other);
        x = y > x ? y : x;
    }
    return x;
}

extern __shared__ uint4 shared_memory[];

// o [B, T, H, V] and lse [B, H, T]. A block takes some queries of a head; the last queries, which see most, begin.
extern "C" __global__ void __launch_bounds__(FORWARD_WARPS* WARP)
flash_attention_forward(storage* __restrict__ o, real* __restrict__ lse, const storage* __restrict__ q,
                        const storage* __restrict__ k, const storage* __restrict__ v,
                        const unsigned char* __restrict__ key_mask, const int64* __restrict__ segments, int queries,
                        int keys, int heads, int key_heads, int value_heads, int key_width, int value_width, real scale,
                        int causal, int masked) {
    constexpr int THREADS = FORWARD_WARPS * WARP, QUERIES = FORWARD_WARPS * OWN, KEYS = FORWARD_KEYS;
    storage* q_tile = reinterpret_cast<storage*>(shared_memory);
    storage* k_tile = q_tile + QUERIES * stride(KEY_WIDTH);
    storage* v_tile = k_tile + KEYS * stride(KEY_WIDTH);
    const int batch = blockIdx.x / heads, h = blockIdx.x % heads;
    const int first = (gridDim.y - 1 - blockIdx.y) * QUERIES, own = first + threadIdx.x / WARP * OWN;
    const Head of_q{batch, h, queries, heads, key_width};
    const Head of_k{batch, key_heads == 1 ? 0 : h, keys, key_heads, key_width};
    const Head of_v{batch, value_heads == 1 ? 0 : h, keys, value_heads, value_width};
    const int64 row = static_cast<int64>(batch) * keys;
    const Mask mask{key_mask + (masked ? row : 0), segments + (masked ? row : 0), queries, keys, causal, masked};
    const int end = mask.end(first + QUERIES);

    fetch<KEY_WIDTH, QUERIES, THREADS>(q_tile, q, of_q, first);
    fetch<KEY_WIDTH, KEYS, THREADS>(k_tile, k, of_k, 0);
    cp_async_commit();
    fetch<VALUE_WIDTH, KEYS, THREADS>(v_tile, v, of_v, 0);
    cp_async_commit();
    real numerator[VALUE_WIDTH / 8][4] = {}, total[2] = {}, largest[2] = {-infinity(), -infinity()};
    bool seen[2] = {};
    const int last[2] = {mask.last_key(own + row_of(0)), mask.last_key(own + row_of(2))};
    for (int s = 0; s < end; s += KEYS) {
        cp_async_wait<1>();  // the keys; the values may still be on their way
        __syncthreads();
        real score[KEYS / 8][4] = {};
        add_scores<KEY_WIDTH>(score, q_tile + threadIdx.x / WARP * OWN * stride(KEY_WIDTH), k_tile);
        __syncthreads();
        if (s + KEYS < end) fetch<KEY_WIDTH, KEYS, THREADS>(k_tile, k, of_k, s + KEYS);
        cp_async_commit();

        const bool all = mask.shows_all(first, QUERIES, s, KEYS);
        real larger[2] = {largest[0], largest[1]}, decay[2];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = s + n * 8 + column_of(i);
                const bool shown = all || (key <= last[i / 2] && mask.shows(own + row_of(i), key));
                score[n][i] = shown ? scale * score[n][i] : -infinity();
                seen[i / 2] |= shown;
                larger[i / 2] = score[n][i] > larger[i / 2] ? score[n][i] : larger[i / 2];
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            larger[i] = row_max_of(larger[i]);
            const real shift = larger[i] - larger[i] == 0 ? larger[i] : 0;
            decay[i] = weight_of(largest[i] - shift);  // (flash_attention.1)
            total[i] *= decay[i];
            largest[i] = larger[i];
            larger[i] = shift;
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[n][i] = weight_of(score[n][i] - larger[i / 2]);
                total[i / 2] += score[n][i];  // (flash_attention.2)
            }
#pragma unroll
        for (int n = 0; n < VALUE_WIDTH / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) numerator[n][i] *= decay[i / 2];
        cp_async_wait<1>();
        __syncthreads();
        add_mixed<VALUE_WIDTH>(numerator, score, v_tile);  // (flash_attention.3)
        __syncthreads();
        if (s + KEYS < end) fetch<VALUE_WIDTH, KEYS, THREADS>(v_tile, v, of_v, s + KEYS);
        cp_async_commit();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const real sum = row_sum_of(total[i]);  // by all lanes, also of a row that sees nothing
        const bool any = row_sum_of(seen[i]) > 0;
        total[i] = any ? finite(sum) : 1;
        const int t = own + row_of(2 * i);
        if (lane() % 4 == 0 && t < queries)  // (flash_attention.4)
            lse[static_cast<int64>(blockIdx.x) * queries + t] = (any ? largest[i] : 0) + logarithm(total[i]);
    }
#pragma unroll
    for (int n = 0; n < VALUE_WIDTH / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) numerator[n][i] /= total[i / 2];
    const Head of_o{batch, h, queries, heads, value_width};
    store<VALUE_WIDTH>(o, numerator, of_o, own);
}

// row_sum [B, H, T] of do ∘ o [B, T, H, V]; a warp a row.
extern "C" __global__ void __launch_bounds__(128)
flash_attention_row_sum(real* __restrict__ row_sum, const storage* __restrict__ dout, const storage* __restrict__ o,
                        int64 rows, int queries, int heads, int value_width) {
    const int64 row = blockIdx.x * static_cast<int64>(blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    real sum = 0;
    for (int i = lane() * VECTOR; i < value_width; i += WARP * VECTOR) {
        const bool wide = value_width % VECTOR == 0;
        const Chunk x = load_chunk<true>(dout + row * value_width, i, value_width, wide);
        const Chunk y = load_chunk<true>(o + row * value_width, i, value_width, wide);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum += x[v] * y[v];
    }
    sum = warp_sum(sum);  // (flash_attention.5)
    const int64 position = row / heads;
    const int h = row % heads;
    if (lane() == 0) row_sum[(position / queries * heads + h) * queries + position % queries] = sum;
}

// dk and dv. A block takes some keys of a head, or of the head that all queries share, whose gradient is the sum over
// their heads in turn.
extern "C" __global__ void __launch_bounds__(BACKWARD_WARPS* WARP)
flash_attention_backward_keys(storage* __restrict__ dk, storage* __restrict__ dv, const storage* __restrict__ dout,
                              const storage* __restrict__ q, const storage* __restrict__ k,
                              const storage* __restrict__ v, const real* __restrict__ lse,
                              const real* __restrict__ row_sum, const unsigned char* __restrict__ key_mask,
                              const int64* __restrict__ segments, int queries, int keys, int heads, int key_heads,
                              int value_heads, int key_width, int value_width, real scale, int causal, int masked) {
    constexpr int THREADS = BACKWARD_WARPS * WARP, KEYS = BACKWARD_WARPS * OWN, QUERIES = BACKWARD_ROWS;
    constexpr int SOME = QUERIES < 16 ? QUERIES : 16;
    storage* k_tile = reinterpret_cast<storage*>(shared_memory);
    storage* v_tile = k_tile + KEYS * stride(KEY_WIDTH);
    storage* q_tile = v_tile + KEYS * stride(VALUE_WIDTH);
    storage* do_tile = q_tile + QUERIES * stride(KEY_WIDTH);
    const int together = key_heads == heads && value_heads == heads ? 1 : heads;  // heads of queries of a block
    const int batch = blockIdx.x / (heads / together), begin = blockIdx.x % (heads / together) * together;
    const int first = blockIdx.y * KEYS, in_tile = threadIdx.x / WARP * OWN, own = first + in_tile;
    const int64 row = static_cast<int64>(batch) * keys;
    const Mask mask{key_mask + (masked ? row : 0), segments + (masked ? row : 0), queries, keys, causal, masked};
    const int begins[2] = {mask.first_query(own + row_of(0)), mask.first_query(own + row_of(2))};
    real dk_sum[KEY_WIDTH / 8][4] = {}, dv_sum[VALUE_WIDTH / 8][4] = {};

    for (int h = begin; h < begin + together; h++) {
        const Head of_q{batch, h, queries, heads, key_width};
        const Head of_do{batch, h, queries, heads, value_width};
        const Head of_k{batch, key_heads == 1 ? 0 : h, keys, key_heads, key_width};
        const Head of_v{batch, value_heads == 1 ? 0 : h, keys, value_heads, value_width};
        const real* own_lse = lse + (static_cast<int64>(batch) * heads + h) * queries;
        const real* own_sum = row_sum + (static_cast<int64>(batch) * heads + h) * queries;
        int t = mask.first_query(first) / QUERIES * QUERIES;  // those before see none of these keys
        fetch<VALUE_WIDTH, KEYS, THREADS>(v_tile, v, of_v, first);
        fetch<KEY_WIDTH, KEYS, THREADS>(k_tile, k, of_k, first);
        fetch<VALUE_WIDTH, QUERIES, THREADS>(do_tile, dout, of_do, t);
        fetch<KEY_WIDTH, QUERIES, THREADS>(q_tile, q, of_q, t);
        for (; t < queries; t += QUERIES) {
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
#pragma unroll 1
            for (int part = 0; part < QUERIES; part += SOME) {  // all at once would need too many registers
                real dp[SOME / 8][4] = {}, p[SOME / 8][4] = {};
                const bool all = mask.shows_all(t + part, SOME, first, KEYS);
                const bool any = t + part + SOME > mask.first_query(own);  // sees a key of this warp
                if (any) {
                    const storage* do_part = do_tile + part * stride(VALUE_WIDTH);
                    add_scores<VALUE_WIDTH>(dp, v_tile + in_tile * stride(VALUE_WIDTH), do_part);
                    add_scores<KEY_WIDTH>(p, k_tile + in_tile * stride(KEY_WIDTH), q_tile + part * stride(KEY_WIDTH));
#pragma unroll
                    for (int n = 0; n < SOME / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int query = t + part + n * 8 + column_of(i), at = query < queries ? query : 0;
                            const bool shown = all || (query >= begins[i / 2] && query < queries &&
                                                       mask.shows(query, own + row_of(i)));
                            p[n][i] = weight_of(shown ? scale * p[n][i] - own_lse[at] : -infinity());
                            dp[n][i] = scale * p[n][i] * (dp[n][i] - own_sum[at]);  // (flash_attention.6), (….7)
                        }
                    add_mixed<VALUE_WIDTH>(dv_sum, p, do_part);
                }
                if (part + SOME == QUERIES) {  // nobody needs this tile of do any more
                    __syncthreads();
                    if (t + QUERIES < queries) fetch<VALUE_WIDTH, QUERIES, THREADS>(do_tile, dout, of_do, t + QUERIES);
                }
                if (any) add_mixed<KEY_WIDTH>(dk_sum, dp, q_tile + part * stride(KEY_WIDTH));
            }
            __syncthreads();
            if (t + QUERIES < queries) fetch<KEY_WIDTH, QUERIES, THREADS>(q_tile, q, of_q, t + QUERIES);
        }
        if (key_heads == heads || h == heads - 1) {
            store<KEY_WIDTH>(dk, dk_sum, of_k, own);
            clear(dk_sum);
        }
        if (value_heads == heads || h == heads - 1) {
            store<VALUE_WIDTH>(dv, dv_sum, of_v, own);
            clear(dv_sum);
        }
    }
}

// dq. A block takes some queries of a head, the last ones first.
extern "C" __global__ void __launch_bounds__(BACKWARD_WARPS* WARP)
flash_attention_backward_queries(storage* __restrict__ dq, const storage* __restrict__ dout,
                                 const storage* __restrict__ q, const storage* __restrict__ k,
                                 const storage* __restrict__ v, const real* __restrict__ lse,
                                 const real* __restrict__ row_sum, const unsigned char* __restrict__ key_mask,
                                 const int64* __restrict__ segments, int queries, int keys, int heads, int key_heads,
                                 int value_heads, int key_width, int value_width, real scale, int causal, int masked) {
    constexpr int THREADS = BACKWARD_WARPS * WARP, QUERIES = BACKWARD_WARPS * OWN, KEYS = BACKWARD_ROWS;
    storage* q_tile = reinterpret_cast<storage*>(shared_memory);
    storage* do_tile = q_tile + QUERIES * stride(KEY_WIDTH);
    storage* k_tile = do_tile + QUERIES * stride(VALUE_WIDTH);
    storage* v_tile = k_tile + KEYS * stride(KEY_WIDTH);
    const int batch = blockIdx.x / heads, h = blockIdx.x % heads;
    const int first = (gridDim.y - 1 - blockIdx.y) * QUERIES, in_tile = threadIdx.x / WARP * OWN, own = first + in_tile;
    const Head of_q{batch, h, queries, heads, key_width};
    const Head of_do{batch, h, queries, heads, value_width};
    const Head of_k{batch, key_heads == 1 ? 0 : h, keys, key_heads, key_width};
    const Head of_v{batch, value_heads == 1 ? 0 : h, keys, value_heads, value_width};
    const int64 row = static_cast<int64>(batch) * keys;
    const Mask mask{key_mask + (masked ? row : 0), segments + (masked ? row : 0), queries, keys, causal, masked};
    const int end = mask.end(first + QUERIES);
    const int last[2] = {mask.last_key(own + row_of(0)), mask.last_key(own + row_of(2))};
    real own_lse[2] = {}, own_sum[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (const int t = own + row_of(2 * i); t < queries) {
            own_lse[i] = lse[static_cast<int64>(blockIdx.x) * queries + t];
            own_sum[i] = row_sum[static_cast<int64>(blockIdx.x) * queries + t];
        }

    fetch<VALUE_WIDTH, QUERIES, THREADS>(do_tile, dout, of_do, first);
    fetch<VALUE_WIDTH, KEYS, THREADS>(v_tile, v, of_v, 0);
    cp_async_commit();
    fetch<KEY_WIDTH, QUERIES, THREADS>(q_tile, q, of_q, first);
    fetch<KEY_WIDTH, KEYS, THREADS>(k_tile, k, of_k, 0);
    cp_async_commit();
    real dq_sum[KEY_WIDTH / 8][4] = {};
    for (int s = 0; s < end; s += KEYS) {
        cp_async_wait<1>();  // do and v; k may still be on its way
        __syncthreads();
        real dp[KEYS / 8][4] = {}, p[KEYS / 8][4] = {};
        add_scores<VALUE_WIDTH>(dp, do_tile + in_tile * stride(VALUE_WIDTH), v_tile);
        __syncthreads();
        if (s + KEYS < end) fetch<VALUE_WIDTH, KEYS, THREADS>(v_tile, v, of_v, s + KEYS);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        add_scores<KEY_WIDTH>(p, q_tile + in_tile * stride(KEY_WIDTH), k_tile);
        const bool all = mask.shows_all(first, QUERIES, s, KEYS);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = s + n * 8 + column_of(i);
                const bool shown = all || (key <= last[i / 2] && mask.shows(own + row_of(i), key));
                p[n][i] = weight_of(shown ? scale * p[n][i] - own_lse[i / 2] : -infinity());  // (flash_attention.6)
                p[n][i] *= scale * (dp[n][i] - own_sum[i / 2]);                              // (flash_attention.7)
            }
        add_mixed<KEY_WIDTH>(dq_sum, p, k_tile);  // (flash_attention.8)
        __syncthreads();
        if (s + KEYS < end) fetch<KEY_WIDTH, KEYS, THREADS>(k_tile, k, of_k, s + KEYS);
        cp_async_commit();
    }
    store<KEY_WIDTH>(dq, dq_sum, of_q, own);
}
