// Rotary position embedding: a thread turns VECTOR pairs, which are two chunks of 16 bytes in either layout.
// Angles are computed by the host in float64; cos and sin come in `real`. Derivation: derivations/rope.md.
#include "common.cuh"

// y = the rotation of x [tokens, heads, 2 half] by ± its angles, cos and sin [angles, half]: token t takes row
// t % angles (all rows of a batch share theirs, or each token has its own). sign: 1 forward, −1 backward.
// interleaved: pair i lies at (2i, 2i + 1), else at (i, i + half). Grid: a thread for VECTOR pairs of a head.
extern "C" __global__ void rope_rotate(storage* y, const storage* x, const real* cos, const real* sin, int64 tokens,
                                       int64 angles, int heads, int half, int interleaved, int sign) {
    const int parts = (half + VECTOR - 1) / VECTOR;
    const int64 thread = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64 head = thread / parts;  // of all tokens
    if (head >= tokens * heads) return;
    const int pair = thread % parts * VECTOR;
    const bool wide = half % VECTOR == 0;
    const storage* from = x + head * 2 * half;
    storage* to = y + head * 2 * half;
    real first[VECTOR], second[VECTOR], c[VECTOR], s[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        const bool inside = pair + v < half;
        const int64 angle = head / heads % angles * half + pair + v;
        c[v] = inside ? cos[angle] : real(0);
        s[v] = inside ? sign * sin[angle] : real(0);
    }
    if (interleaved) {
        load_chunk<true>(first, from, 2 * pair, 2 * half, wide);
        load_chunk<true>(second, from, 2 * pair + VECTOR, 2 * half, wide);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {  // pair v: elements 2v and 2v + 1 of the two chunks
            real(&chunk)[VECTOR] = 2 * v < VECTOR ? first : second;
            const int k = 2 * v % VECTOR;
            const real a = chunk[k], b = chunk[k + 1];
            chunk[k] = a * c[v] - b * s[v];  // (rope.5)
            chunk[k + 1] = a * s[v] + b * c[v];
        }
        store_chunk(first, to, 2 * pair, 2 * half, wide);
        store_chunk(second, to, 2 * pair + VECTOR, 2 * half, wide);
    } else {
        load_chunk<true>(first, from, pair, half, wide);
        load_chunk<true>(second, from + half, pair, half, wide);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            const real a = first[v], b = second[v];
            first[v] = a * c[v] - b * s[v];  // (rope.5)
            second[v] = a * s[v] + b * c[v];
        }
        store_chunk(first, to, pair, half, wide);
        store_chunk(second, to + half, pair, half, wide);
    }
}
