// Attention, step 2: no matrix is held. A block has some rows, queries or keys; tiles of the other side pass through
// shared memory, where all its rows read them, and probabilities live in registers, for one tile at a time. The softmax
// is online; the backward computes the probabilities again. No tensor cores yet, and a tile is waited for before it is
// used. Launched as ../flash_attention.cu is. Derivation: derivations/flash_attention.md.
#include "common.cuh"

constexpr int OWN = 16;  // rows of a warp: two lanes a row, the even one for even keys and columns, the odd one for odd

__device__ __forceinline__ int half() { return threadIdx.x % 2; }
__device__ __forceinline__ int in_block() { return threadIdx.x / 2; }  // this thread's row of the block's
__device__ __forceinline__ real of_row(real x) { return x + __shfl_xor_sync(ALL_LANES, x, 1); }

// A row of a tile is 16 bytes longer than its numbers: the same column of 8 rows lies in different banks.
__device__ constexpr int stride(int width) { return width + VECTOR; }

// One head of an array [B, positions, heads, width].
struct Head {
    int batch, head, positions, heads, width;

    __device__ __forceinline__ int64 at(int position) const {
        return ((static_cast<int64>(batch) * positions + position) * heads + (heads == 1 ? 0 : head)) * width;
    }
};

// Copies rows first … first + rows − 1 into a tile; what is not in the array becomes 0. All threads must call it.
template <int WIDTH>
__device__ __forceinline__ void fetch(storage* tile, const storage* array, const Head& head, int first, int rows) {
    for (int i = threadIdx.x; i < rows * WIDTH; i += blockDim.x) {
        const int row = i / WIDTH, column = i % WIDTH;
        const bool inside = first + row < head.positions && column < head.width;
        tile[row * stride(WIDTH) + column] = inside ? array[head.at(first + row) + column] : storage{};
    }
}

template <int WIDTH>
__device__ __forceinline__ real dot(const storage* a, const storage* b) {
    real sum = 0;
#pragma unroll 8
    for (int i = 0; i < WIDTH; i++) sum += widen(a[i]) * widen(b[i]);
    return sum;
}

// sum += Σ_j p[j] tile[j], this lane's columns; the two lanes of a row have the weights of even and of odd j.
template <int WIDTH, int ROWS>
__device__ __forceinline__ void add_mixed(real (&sum)[WIDTH / 2], const real (&p)[ROWS / 2], const storage* tile) {
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        const real weight = __shfl_sync(ALL_LANES, p[j / 2], lane() / 2 * 2 + j % 2);
#pragma unroll
        for (int c = 0; c < WIDTH / 2; c++) sum[c] += weight * widen(tile[j * stride(WIDTH) + 2 * c + half()]);
    }
}

template <int WIDTH>
__device__ __forceinline__ void store(storage* array, real (&sum)[WIDTH / 2], const Head& head, int row) {
#pragma unroll
    for (int c = 0; c < WIDTH / 2; c++) {
        const int column = 2 * c + half();
        if (row < head.positions && column < head.width) array[head.at(row) + column] = narrow(sum[c]);
        sum[c] = 0;
    }
}

// Who sees whom.
struct Mask {
    const unsigned char* key_mask;
    const int64* segments;
    int64 row;  // of a batch's keys
    int queries, keys, causal, masked;

    __device__ __forceinline__ int position(int t) const { return t + keys - queries; }

    __device__ __forceinline__ bool sees(int t, int s) const {
        if (t >= queries || s >= keys || (causal && s > position(t))) return false;
        const int64* owner = segments + row;
        return !masked || (key_mask[row + s] && owner[s] == owner[position(t) < 0 ? 0 : position(t)]);
    }
};

extern __shared__ uint4 shared_memory[];

// o and lse. A block takes some queries of a head.
extern "C" __global__ void flash_attention_forward(storage* o, real* lse, const storage* q, const storage* k,
                                                   const storage* v, const unsigned char* key_mask,
                                                   const int64* segments, int queries, int keys, int heads,
                                                   int key_heads, int value_heads, int key_width, int value_width,
                                                   real scale, int causal, int masked) {
    constexpr int QUERIES = FORWARD_WARPS * OWN, KEYS = FORWARD_KEYS;
    storage* q_tile = reinterpret_cast<storage*>(shared_memory);
    storage* k_tile = q_tile + QUERIES * stride(KEY_WIDTH);
    storage* v_tile = k_tile + KEYS * stride(KEY_WIDTH);
    const int batch = blockIdx.x / heads, h = blockIdx.x % heads, first = blockIdx.y * QUERIES, own = first + in_block();
    const Mask mask{key_mask, segments, static_cast<int64>(batch) * keys, queries, keys, causal, masked};
    const int last = first + QUERIES < queries ? first + QUERIES : queries, end = causal ? mask.position(last) : keys;
    real numerator[VALUE_WIDTH / 2] = {}, total = 0, largest = -infinity(), seen = 0;
    fetch<KEY_WIDTH>(q_tile, q, Head{batch, h, queries, heads, key_width}, first, QUERIES);
    for (int begin = 0; begin < end; begin += KEYS) {
        __syncthreads();  // all are done with the tiles before
        fetch<KEY_WIDTH>(k_tile, k, Head{batch, h, keys, key_heads, key_width}, begin, KEYS);
        fetch<VALUE_WIDTH>(v_tile, v, Head{batch, h, keys, value_heads, value_width}, begin, KEYS);
        __syncthreads();
        real p[KEYS / 2], larger = largest;
#pragma unroll
        for (int j = 0; j < KEYS / 2; j++) {
            const bool shown = mask.sees(own, begin + 2 * j + half());
            const storage* key = k_tile + (2 * j + half()) * stride(KEY_WIDTH);
            const real score = scale * dot<KEY_WIDTH>(q_tile + in_block() * stride(KEY_WIDTH), key);
            p[j] = shown ? score : -infinity();
            larger = p[j] > larger ? p[j] : larger;
            seen = shown ? 1 : seen;
        }
        const real other = __shfl_xor_sync(ALL_LANES, larger, 1);
        larger = other > larger ? other : larger;
        const real shift = larger - larger == 0 ? larger : 0;
        const real decay = exponential(largest - shift);  // (flash_attention.1)
        total *= decay;
#pragma unroll
        for (int j = 0; j < KEYS / 2; j++) {
            p[j] = exponential(p[j] - shift);
            total += p[j];  // (flash_attention.2)
        }
#pragma unroll
        for (int c = 0; c < VALUE_WIDTH / 2; c++) numerator[c] *= decay;
        add_mixed<VALUE_WIDTH, KEYS>(numerator, p, v_tile);  // (flash_attention.3)
        largest = larger;
    }
    const bool any = of_row(seen) > 0;
    total = of_row(total);
    total = any ? finite(total) : 1;
#pragma unroll
    for (int c = 0; c < VALUE_WIDTH / 2; c++) numerator[c] /= total;
    store<VALUE_WIDTH>(o, numerator, Head{batch, h, queries, heads, value_width}, own);
    if (half() == 0 && own < queries)  // (flash_attention.4)
        lse[static_cast<int64>(blockIdx.x) * queries + own] = (any ? largest : 0) + logarithm(total);
}

// row_sum [B, H, T] of do ∘ o; a warp a row.
extern "C" __global__ void flash_attention_row_sum(real* row_sum, const storage* dout, const storage* o, int64 rows,
                                                   int queries, int heads, int value_width) {
    const int64 row = blockIdx.x * static_cast<int64>(blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    real sum = 0;
    for (int i = lane(); i < value_width; i += WARP)
        sum += widen(dout[row * value_width + i]) * widen(o[row * value_width + i]);
    sum = warp_sum(sum);  // (flash_attention.5)
    const int64 position = row / heads, h = row % heads;
    if (lane() == 0) row_sum[(position / queries * heads + h) * queries + position % queries] = sum;
}

// dk and dv. A block takes some keys of a head, or of one that the queries' heads share, whose sum it makes.
extern "C" __global__ void flash_attention_backward_keys(storage* dk, storage* dv, const storage* dout, const storage* q,
                                                         const storage* k, const storage* v, const real* lse,
                                                         const real* row_sum, const unsigned char* key_mask,
                                                         const int64* segments, int queries, int keys, int heads,
                                                         int key_heads, int value_heads, int key_width, int value_width,
                                                         real scale, int causal, int masked) {
    constexpr int KEYS = BACKWARD_WARPS * OWN, QUERIES = BACKWARD_ROWS;
    storage* k_tile = reinterpret_cast<storage*>(shared_memory);
    storage* v_tile = k_tile + KEYS * stride(KEY_WIDTH);
    storage* q_tile = v_tile + KEYS * stride(VALUE_WIDTH);
    storage* do_tile = q_tile + QUERIES * stride(KEY_WIDTH);
    const int together = key_heads == heads && value_heads == heads ? 1 : heads;
    const int batch = blockIdx.x / (heads / together), head = blockIdx.x % (heads / together) * together;
    const int first = blockIdx.y * KEYS, own = first + in_block();
    const Mask mask{key_mask, segments, static_cast<int64>(batch) * keys, queries, keys, causal, masked};
    const int before = causal && first > keys - queries ? first - (keys - queries) : 0;  // see none of these keys
    real dk_sum[KEY_WIDTH / 2] = {}, dv_sum[VALUE_WIDTH / 2] = {};
    for (int h = head; h < head + together; h++) {
        const Head of_k{batch, h, keys, key_heads, key_width}, of_v{batch, h, keys, value_heads, value_width};
        const int64 row = (static_cast<int64>(batch) * heads + h) * queries;
        __syncthreads();
        fetch<KEY_WIDTH>(k_tile, k, of_k, first, KEYS);
        fetch<VALUE_WIDTH>(v_tile, v, of_v, first, KEYS);
        for (int begin = before; begin < queries; begin += QUERIES) {
            __syncthreads();
            fetch<KEY_WIDTH>(q_tile, q, Head{batch, h, queries, heads, key_width}, begin, QUERIES);
            fetch<VALUE_WIDTH>(do_tile, dout, Head{batch, h, queries, heads, value_width}, begin, QUERIES);
            __syncthreads();
            real p[QUERIES / 2], ds[QUERIES / 2];
#pragma unroll
            for (int j = 0; j < QUERIES / 2; j++) {
                const int in_tile = 2 * j + half(), t = begin + in_tile;
                const bool shown = mask.sees(t, own);
                const real score = scale * dot<KEY_WIDTH>(k_tile + in_block() * stride(KEY_WIDTH),
                                                          q_tile + in_tile * stride(KEY_WIDTH));
                const real dp = dot<VALUE_WIDTH>(v_tile + in_block() * stride(VALUE_WIDTH),
                                                 do_tile + in_tile * stride(VALUE_WIDTH));
                p[j] = shown ? exponential(score - lse[row + t]) : 0;          // (flash_attention.6)
                ds[j] = shown ? scale * p[j] * (dp - row_sum[row + t]) : 0;    // (flash_attention.7)
            }
            add_mixed<VALUE_WIDTH, QUERIES>(dv_sum, p, do_tile);
            add_mixed<KEY_WIDTH, QUERIES>(dk_sum, ds, q_tile);
        }
        if (key_heads == heads || h == heads - 1) store<KEY_WIDTH>(dk, dk_sum, of_k, own);
        if (value_heads == heads || h == heads - 1) store<VALUE_WIDTH>(dv, dv_sum, of_v, own);
    }
}

// dq. A block takes some queries of a head.
extern "C" __global__ void flash_attention_backward_queries(storage* dq, const storage* dout, const storage* q,
                                                            const storage* k, const storage* v, const real* lse,
                                                            const real* row_sum, const unsigned char* key_mask,
                                                            const int64* segments, int queries, int keys, int heads,
                                                            int key_heads, int value_heads, int key_width,
                                                            int value_width, real scale, int causal, int masked) {
    constexpr int QUERIES = BACKWARD_WARPS * OWN, KEYS = BACKWARD_ROWS;
    storage* q_tile = reinterpret_cast<storage*>(shared_memory);
    storage* do_tile = q_tile + QUERIES * stride(KEY_WIDTH);
    storage* k_tile = do_tile + QUERIES * stride(VALUE_WIDTH);
    storage* v_tile = k_tile + KEYS * stride(KEY_WIDTH);
    const int batch = blockIdx.x / heads, h = blockIdx.x % heads, first = blockIdx.y * QUERIES, own = first + in_block();
    const Mask mask{key_mask, segments, static_cast<int64>(batch) * keys, queries, keys, causal, masked};
    const int last = first + QUERIES < queries ? first + QUERIES : queries, end = causal ? mask.position(last) : keys;
    const Head of_q{batch, h, queries, heads, key_width};
    const int64 row = static_cast<int64>(blockIdx.x) * queries + own;
    const real own_lse = own < queries ? lse[row] : 0, own_sum = own < queries ? row_sum[row] : 0;
    fetch<KEY_WIDTH>(q_tile, q, of_q, first, QUERIES);
    fetch<VALUE_WIDTH>(do_tile, dout, Head{batch, h, queries, heads, value_width}, first, QUERIES);
    real dq_sum[KEY_WIDTH / 2] = {};
    for (int begin = 0; begin < end; begin += KEYS) {
        __syncthreads();
        fetch<KEY_WIDTH>(k_tile, k, Head{batch, h, keys, key_heads, key_width}, begin, KEYS);
        fetch<VALUE_WIDTH>(v_tile, v, Head{batch, h, keys, value_heads, value_width}, begin, KEYS);
        __syncthreads();
        real ds[KEYS / 2];
#pragma unroll
        for (int j = 0; j < KEYS / 2; j++) {
            const int in_tile = 2 * j + half();
            const bool shown = mask.sees(own, begin + in_tile);
            const real score = scale * dot<KEY_WIDTH>(q_tile + in_block() * stride(KEY_WIDTH),
                                                      k_tile + in_tile * stride(KEY_WIDTH));
            const real dp = dot<VALUE_WIDTH>(do_tile + in_block() * stride(VALUE_WIDTH),
                                             v_tile + in_tile * stride(VALUE_WIDTH));
            const real p = exponential(score - own_lse);     // (flash_attention.6)
            ds[j] = shown ? scale * p * (dp - own_sum) : 0;  // (flash_attention.7)
        }
        add_mixed<KEY_WIDTH, KEYS>(dq_sum, ds, k_tile);  // (flash_attention.8)
    }
    store<KEY_WIDTH>(dq, dq_sum, of_q, own);
}
