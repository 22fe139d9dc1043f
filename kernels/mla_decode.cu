// Attention of decoding. A row is a query: one head of one new token of a sequence. All heads share one key per cached
// token, its row of the latent cache, whose first numbers are also its value. Blocks take parts of the keys (splits); a
// second kernel combines their results.
//
// A block takes up to ROWS rows and one split. Tiles of KEYS keys pass through shared memory in two stages, one on its way
// while the other is used, so each number of the cache is read once for ROWS rows, and serves as key and as value.
// Scores and weights lie in shared memory; each warp keeps the sums of some columns of the values, for all rows. In
// bfloat16 both products are mma.sync on tensor cores, in float32 and float64 multiplications and additions.
// Derivations: derivations/mla_absorbed.md and derivations/flash_attention.md.
//
// refimpl/kernels/mla_decode.py defines WARPS, ROWS, KEYS, KEY_WIDTH (a multiple of 32) and VALUE_WIDTH (a multiple of
// 16 · WARPS, at most KEY_WIDTH). The arrays' widths may be less: what is missing is 0.
#include "common.cuh"

constexpr int OWN = 16, THREADS = WARPS * WARP;
constexpr int GROUPS = ROWS / OWN;            // of 16 rows
constexpr int COLUMNS = VALUE_WIDTH / WARPS;  // of the values, that a warp adds up
// A row of a tile in shared memory is an odd number of 16 bytes long, so that the same columns of 8 rows lie in
// different banks.
constexpr int STRIDE = KEY_WIDTH + VECTOR;
constexpr int SCORE_STRIDE = KEYS + 16 / sizeof(real);                        // of scores
constexpr int WEIGHT_STRIDE = SCORE_STRIDE * (sizeof(real) / sizeof(storage));  // of weights, in the scores' place
constexpr int SHARE = THREADS / ROWS < KEYS ? THREADS / ROWS : KEYS;  // threads that share a row of scores
constexpr int EACH = KEYS / SHARE;                                    // scores of such a thread

__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }

// Starts to copy rows first … first + COUNT − 1 of an array [rows, width] into a tile; rows and columns outside the array
// become 0. The tile is there after a cp_async_wait and a barrier. All threads of a block must call it.
template <int COUNT>
__device__ __forceinline__ void fetch(storage* tile, const storage* array, int first, int rows, int width) {
    constexpr int CHUNKS = KEY_WIDTH / VECTOR;
    const bool wide = width % VECTOR == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < COUNT * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * VECTOR;
        const bool inside = first + row < rows && column < width;
        const storage* from = array + (inside ? static_cast<int64>(first + row) * width + column : 0);
        storage* to = tile + row * STRIDE + column;
        fetch_chunk(to, from, column, width, inside, wide);
    }
}

// score = q kᵀ for a tile of keys, by the whole block.
__device__ __forceinline__ void put_scores(real* score, const storage* q, const storage* k) {
#if defined(STORAGE_BFLOAT16)
    constexpr int SIDE = WARPS / GROUPS > 1 ? WARPS / GROUPS : 1;        // warps that share 16 rows
    constexpr int TILES = KEYS / 8 / SIDE > 1 ? KEYS / 8 / SIDE : 1;     // of 8 keys, of a warp
#pragma unroll 1
    for (int part = warp(); part < GROUPS * (KEYS / 8 / TILES); part += WARPS) {
        const int row = part % GROUPS * OWN, key = part / GROUPS * TILES * 8;
        const storage* a = q + (row + lane() % 16) * STRIDE + lane() / 16 * 8;
        const storage* b = k + (key + lane() % 8) * STRIDE + lane() / 8 * 8;
        real sum[TILES][4] = {};
#pragma unroll 2
        for (int i = 0; i < KEY_WIDTH; i += 32) {
            unsigned x[2][4];
            ldmatrix_x4(x[0], a + i);
            ldmatrix_x4(x[1], a + i + 16);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                unsigned y[4];
                ldmatrix_x4(y, b + n * 8 * STRIDE + i);
                mma_m16n8k16(sum[n], x[0], y[0], y[1]);
                mma_m16n8k16(sum[n], x[1], y[2], y[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) score[(row + row_of(i)) * SCORE_STRIDE + key + n * 8 + column_of(i)] = sum[n][i];
    }
#else
#pragma unroll 1
    for (int part = threadIdx.x; part < ROWS * KEYS; part += THREADS) {
        const int row = part / KEYS, key = part % KEYS;
        real sum[VECTOR] = {};
#pragma unroll 4
        for (int i = 0; i < KEY_WIDTH; i += VECTOR) {
            const Chunk x = ld_shared_v4(q + row * STRIDE + i), y = ld_shared_v4(k + key * STRIDE + i);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) sum[v] += x[v] * y[v];
        }
#pragma unroll
        for (int v = 1; v < VECTOR; v++) sum[0] += sum[v];
        score[row * SCORE_STRIDE + key] = sum[0];
    }
#endif
}

// sum += weight v for a tile of keys, in this warp's columns of the values.
__device__ __forceinline__ void add_values(real (&sum)[GROUPS][COLUMNS / 8][4], const storage* weight, const storage* v) {
    v += warp() * COLUMNS;
#if defined(STORAGE_BFLOAT16)
#pragma unroll
    for (int k = 0; k < KEYS; k += 16) {
        unsigned x[GROUPS][4];
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            ldmatrix_x4(x[g], weight + (g * OWN + lane() % 16) * WEIGHT_STRIDE + k + lane() / 16 * 8);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2) {
            unsigned y[4];
            ldmatrix_x4_trans(y, v + (k + lane() % 16) * STRIDE + n * 8 + lane() / 16 * 8);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                mma_m16n8k16(sum[g][n], x[g], y[0], y[1]);
                mma_m16n8k16(sum[g][n + 1], x[g], y[2], y[3]);
            }
        }
    }
#else
#pragma unroll 1
    for (int k = 0; k < KEYS; k++)
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            const real left = v[k * STRIDE + n * 8 + column_of(0)], right = v[k * STRIDE + n * 8 + column_of(1)];
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sum[g][n][i] += weight[(g * OWN + row_of(i)) * WEIGHT_STRIDE + k] * (i % 2 ? right : left);
        }
#endif
}

// Which keys one row sees: a query at position `own`.
struct Mask {
    const unsigned char* key_mask;  // [S], or null
    const int64* segments;          // [S], or null
    int own, last;                  // last: the last key by the order of positions

    __device__ __forceinline__ bool shows(int s) const {
        return s <= last && (!key_mask || key_mask[s]) && (!segments || segments[s] == segments[own]);
    }
};

// The sum and the maximum over the threads that share a row.
__device__ __forceinline__ real row_sum_of(real x) {
#pragma unroll
    for (int other = 1; other < SHARE; other *= 2) x += __shfl_xor_sync(ALL_LANES, x, other);
    return x;
}

__device__ __forceinline__ real row_max_of(real x) {
#pragma unroll
    for (int other = 1; other < SHARE; other *= 2) {
        const real y = __shfl_xor_sync(ALL_LANES, x, other);
        x = y > x ? y : x;
    }
    return x;
}

extern __shared__ uint4 shared_memory[];

// From the keys of each split: numerators [B, T·H, splits, V], and totals [B, T·H, splits, 2], the largest score and the
// sum of weights; a sum of −1 says that the row sees none of these keys. A split is `tiles` tiles of keys. hidden, cut:
// whether key_mask and segments are given. Grid: x ROWS rows of a sequence, y a split.
extern "C" __global__ void __launch_bounds__(WARPS* WARP, 1)
mla_decode_split(real* __restrict__ numerators, real* __restrict__ totals, const storage* __restrict__ q,
                 const storage* __restrict__ cache, const unsigned char* __restrict__ key_mask,
                 const int64* __restrict__ segments, int queries, int heads, int keys, int key_width, int value_width,
                 int tiles, real scale, int causal, int hidden, int cut) {
    storage* q_tile = reinterpret_cast<storage*>(shared_memory);
    storage* k_tile = q_tile + ROWS * STRIDE;  // two of them
    real* score = reinterpret_cast<real*>(k_tile + 2 * KEYS * STRIDE);
    storage* weight = reinterpret_cast<storage*>(score);
    real* decay = score + ROWS * SCORE_STRIDE;

    const int rows = queries * heads, blocks = (rows + ROWS - 1) / ROWS;
    const int batch = blockIdx.x / blocks, first = blockIdx.x % blocks * ROWS;
    const int begin = blockIdx.y * tiles * KEYS, end = keys - begin < tiles * KEYS ? keys : begin + tiles * KEYS;
    cache += static_cast<int64>(batch) * keys * key_width;
    fetch<ROWS>(q_tile, q + static_cast<int64>(batch) * rows * key_width, first, rows, key_width);
    fetch<KEYS>(k_tile, cache, begin, end, key_width);
    cp_async_commit();

    const int own = threadIdx.x / SHARE, t = (first + own) / heads, at = t + keys - queries;  // of the scores
    const int64 row = static_cast<int64>(batch) * keys;
    const int last = own >= ROWS || t >= queries ? -1 : causal && at < end ? at : end - 1;
    const Mask mask{hidden ? key_mask + row : nullptr, cut ? segments + row : nullptr, at, last};
    real numerator[GROUPS][COLUMNS / 8][4] = {}, total = 0, largest = -infinity();
    int seen = 0, stage = 0;
    for (int s = begin; s < end; s += KEYS, stage ^= 1) {
        const storage* now = k_tile + stage * KEYS * STRIDE;
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and nobody reads the one before
        if (s + KEYS < end) fetch<KEYS>(k_tile + (stage ^ 1) * KEYS * STRIDE, cache, s + KEYS, end, key_width);
        cp_async_commit();
        put_scores(score, q_tile, now);
        __syncthreads();
        if (own < ROWS) {  // whole warps
            real x[EACH], larger = largest;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int key = j * SHARE + threadIdx.x % SHARE;
                const bool shown = mask.shows(s + key);
                x[j] = shown ? scale * score[own * SCORE_STRIDE + key] : -infinity();
                seen |= shown;
                larger = x[j] > larger ? x[j] : larger;
            }
            larger = row_max_of(larger);
            const real shift = larger - larger == 0 ? larger : 0;
            const real factor = weight_of(largest - shift);  // (flash_attention.1)
            total *= factor;
            largest = larger;
            if (threadIdx.x % SHARE == 0) decay[own] = factor;
            __syncwarp();  // the weights lie where the row's other threads have read scores
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const real p = weight_of(x[j] - shift);
                total += p;  // (flash_attention.2)
                weight[own * WEIGHT_STRIDE + j * SHARE + threadIdx.x % SHARE] = narrow(p);
            }
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const real upper = decay[g * OWN + row_of(0)], lower = decay[g * OWN + row_of(2)];
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) numerator[g][n][i] *= i < 2 ? upper : lower;
        }
        add_values(numerator, weight, now);  // (flash_attention.3)
    }

    const int splits = gridDim.y;
    total = row_sum_of(total);
    seen = row_sum_of(seen) > 0;
    const int64 start = static_cast<int64>(batch) * rows;
    if (own < ROWS && first + own < rows && threadIdx.x % SHARE == 0) {
        real* to = totals + ((start + first + own) * splits + blockIdx.y) * 2;
        to[0] = largest;
        to[1] = seen ? total : -1;
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = first + g * OWN + row_of(i), column = warp() * COLUMNS + n * 8 + column_of(i);
                if (r < rows && column < value_width)
                    numerators[((start + r) * splits + blockIdx.y) * value_width + column] = numerator[g][n][i];
            }
}

// o [B, T, H, V] from the results of the splits; a row that sees no key is 0. Grid: a block per row; a thread per column.
extern "C" __global__ void __launch_bounds__(256)
mla_decode_combine(storage* __restrict__ o, const real* __restrict__ numerators, const real* __restrict__ totals,
                   int splits, int value_width) {
    const int64 row = blockIdx.x;
    totals += row * splits * 2;
    numerators += row * splits * value_width;
    real largest = -infinity();
    for (int i = 0; i < splits; i++)
        if (totals[2 * i + 1] >= 0 && totals[2 * i] > largest) largest = totals[2 * i];
    const real shift = largest - largest == 0 ? largest : 0;
    for (int column = threadIdx.x; column < value_width; column += blockDim.x) {
        real sum = 0, total = 0;
        bool seen = false;
        for (int i = 0; i < splits; i++) {
            if (totals[2 * i + 1] < 0) continue;
            const real factor = exponential(totals[2 * i] - shift);
            total += factor * totals[2 * i + 1];
            sum += factor * numerators[static_cast<int64>(i) * value_width + column];
            seen = true;
        }
        o[row * value_width + column] = narrow(seen ? sum / total : 0);  // (mla_absorbed.9)
    }
}
