// Attention, step 1: the matrix of probabilities [B, H, T, S] is held, in `real`, and another of its size in the backward;
// what a query sees is a matrix too. Products are made by a thread for each of their elements, which reads a row and a
// column from memory. ../flash_attention.cu is the last step. Derivation: derivations/attention.md.
#include "common.cuh"

__device__ __forceinline__ int64 thread_of_grid() { return blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x; }

// Where the row of an array [B, positions, heads, width] begins; one head serves all.
__device__ __forceinline__ int64 row_at(int64 batch, int positions, int64 position, int heads, int64 head, int width) {
    return ((batch * positions + position) * heads + (heads == 1 ? 0 : head)) * width;
}

// product[b, h, t, s] = a[b, t, h] · b[b, s, h]. Grid: a thread an element.
extern "C" __global__ void attention_products(real* product, const storage* a, const storage* b, int64 size, int queries,
                                              int keys, int heads, int b_heads, int width) {
    const int64 i = thread_of_grid();
    if (i >= size) return;
    const int64 s = i % keys, t = i / keys % queries, h = i / keys / queries % heads, batch = i / keys / queries / heads;
    const storage* x = a + row_at(batch, queries, t, heads, h, width);
    const storage* y = b + row_at(batch, keys, s, b_heads, h, width);
    real sum = 0;
    for (int c = 0; c < width; c++) sum += widen(x[c]) * widen(y[c]);
    product[i] = sum;  // (attention.1) without the scale, or (attention.5)
}

// In place, the probabilities of products q kᵀ; shown [B, T, S]. Grid: a thread a row, B H T of them.
extern "C" __global__ void attention_softmax(real* p, const unsigned char* shown, int64 rows, int queries, int keys,
                                             int heads, real scale) {
    const int64 row = thread_of_grid();
    if (row >= rows) return;
    const unsigned char* sees = shown + (row / queries / heads * queries + row % queries) * keys;
    real* own = p + row * keys;
    real largest = -infinity(), sum = 0;
    bool any = false;
    for (int s = 0; s < keys; s++) {
        const real score = sees[s] ? scale * own[s] : -infinity();
        largest = score > largest ? score : largest;
        any |= sees[s] != 0;
    }
    const real shift = largest - largest == 0 ? largest : 0;
    for (int s = 0; s < keys; s++) {
        own[s] = sees[s] ? exponential(scale * own[s] - shift) : 0;
        sum += own[s];
    }
    sum = any ? finite(sum) : 1;
    for (int s = 0; s < keys; s++) own[s] /= sum;  // (attention.2)
}

// In place, the gradient of q kᵀ from that of the probabilities. Grid: a thread a row.
extern "C" __global__ void attention_softmax_backward(real* dp, const real* p, int64 rows, int keys, real scale) {
    const int64 row = thread_of_grid();
    if (row >= rows) return;
    real sum = 0;
    for (int s = 0; s < keys; s++) sum += p[row * keys + s] * dp[row * keys + s];
    for (int s = 0; s < keys; s++)
        dp[row * keys + s] = scale * p[row * keys + s] * (dp[row * keys + s] - sum);  // (attention.6)
}

// y[b, t, h] = Σ_s p[b, h, t, s] x[b, s, h]: o of the values, dq of the keys. Grid: a thread an element of y.
extern "C" __global__ void attention_mix_keys(storage* y, const real* p, const storage* x, int64 size, int queries,
                                              int keys, int heads, int x_heads, int width) {
    const int64 i = thread_of_grid();
    if (i >= size) return;
    const int64 h = i / width % heads, t = i / width / heads % queries, batch = i / width / heads / queries;
    const real* weight = p + ((batch * heads + h) * queries + t) * keys;
    real sum = 0;
    for (int s = 0; s < keys; s++)
        sum += weight[s] * widen(x[row_at(batch, keys, s, x_heads, h, width) + i % width]);
    y[i] = narrow(sum);  // (attention.3) (attention.7)
}

// y[b, s, h] = Σ_t p[b, h, t, s] x[b, t, h], over all heads if y has one: dv of do, dk of the queries. Grid: a thread an
// element of y.
extern "C" __global__ void attention_mix_queries(storage* y, const real* p, const storage* x, int64 size, int queries,
                                                 int keys, int heads, int y_heads, int width) {
    const int64 i = thread_of_grid();
    if (i >= size) return;
    const int64 own = i / width % y_heads, s = i / width / y_heads % keys, batch = i / width / y_heads / keys;
    real sum = 0;
    for (int64 h = y_heads == 1 ? 0 : own; h < (y_heads == 1 ? heads : own + 1); h++)
        for (int t = 0; t < queries; t++)
            sum += p[((batch * heads + h) * queries + t) * keys + s] *
                   widen(x[row_at(batch, queries, t, heads, h, width) + i % width]);
    y[i] = narrow(sum);  // (attention.4) (attention.8) (attention.10)
}
