// Rotary position embedding: a thread turns VECTOR pairs, which are two chunks of 16 bytes in either layout.
// Angles are computed by the host in float64; cos and sin come in `real`. Derivation: derivations/rope.md.
#include "common.cuh"

// Numbers i to i + VECTOR − 1 of a row of `half`, 0 past its end; wide: all are inside, at a multiple of 16 bytes. They
// are read again by other heads, through L1.
__device__ __forceinline__ void load_angles(real (&to)[VECTOR], const real* row, int i, int half, bool wide) {
    if (wide) {
        constexpr int each = 16 / sizeof(real);
#pragma unroll
        for (int v = 0; v < VECTOR; v += each) {
            const Chunk chunk = ld_global_v4(row + i + v);
            memcpy(to + v, chunk.word, sizeof chunk.word);
        }
    } else {
#pragma unroll
        for (int v = 0; v < VECTOR; v++) to[v] = i + v < half ? row[i + v] : real(0);
    }
}

// y = the rotation of x [tokens, heads, 2 half] by ± its angles, cos and sin [angles, half]: token t takes row
// t % angles (all rows of a batch share theirs, or each token has its own). sign: 1 forward, −1 backward.
// interleaved: pair i lies at (2i, 2i + 1), else at (i, i + half). Grid: a thread for VECTOR pairs of a head, fewer than 2³²
// in all, so that heads, tokens and angles are counted in 32 bits: in 64 each division is a call.
extern "C" __global__ void rope_rotate(storage* y, const storage* x, const real* cos, const real* sin, int64 tokens,
                                       int64 angles, int heads, int half, int interleaved, int sign) {
    const unsigned parts = (half + VECTOR - 1) / VECTOR;
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned head = thread / parts;  // of all tokens
    if (head >= static_cast<unsigned>(tokens) * heads) return;
    const int pair = (thread - head * parts) * VECTOR;
    const int64 turn = int64(head / heads % static_cast<unsigned>(angles)) * half;  // where its angles begin
    const bool wide = half % VECTOR == 0;
    const int64 at = int64(head) * 2 * half + (interleaved ? 2 * pair : pair);  // of the first chunk, and of the second:
    const int64 then = at + (interleaved ? VECTOR : half);
    const int left = interleaved ? 2 * (half - pair) : half - pair, left_then = interleaved ? left - VECTOR : left;
    const Chunk x0 = load_chunk<true>(x + at, 0, left, wide), x1 = load_chunk<true>(x + then, 0, left_then, wide);
    real c[VECTOR], s[VECTOR], y0[VECTOR], y1[VECTOR];
    load_angles(c, cos + turn, pair, half, wide);
    load_angles(s, sin + turn, pair, half, wide);
#pragma unroll
    for (int v = 0; v < VECTOR; v++) s[v] *= sign;
    if (interleaved) {
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {  // pair v: elements 2v and 2v + 1 of the two chunks
            const int k = 2 * v % VECTOR;
            const real a = (2 * v < VECTOR ? x0 : x1)[k], b = (2 * v < VECTOR ? x0 : x1)[k + 1];
            (2 * v < VECTOR ? y0 : y1)[k] = a * c[v] - b * s[v];  // (rope.5)
            (2 * v < VECTOR ? y0 : y1)[k + 1] = a * s[v] + b * c[v];
        }
    } else {
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            y0[v] = x0[v] * c[v] - x1[v] * s[v];  // (rope.5)
            y1[v] = x0[v] * s[v] + x1[v] * c[v];
        }
    }
    store_chunk(y0, y + at, 0, left, wide);
    store_chunk(y1, y + then, 0, left_then, wide);
}
