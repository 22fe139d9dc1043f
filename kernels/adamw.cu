// AdamW in one pass: four arrays read, three written, nothing else touches memory. refimpl/optimizer.py is its
// reference. Parameters are in storage type; gradient and moments in `real`, as weight gradients are.
#include "common.cuh"

// Grid: a thread an element. rest1 = 1 − β1 and rest2 = 1 − β2; correct1 = 1 − β1^step and correct2 likewise.
extern "C" __global__ void adamw_update(storage* p, real* m, real* v, const real* g, int64 size, real rest1, real rest2,
                                        real correct1, real correct2, real epsilon, real decay, real learning_rate) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const real gradient = g[i], before = widen(p[i]);
    const real mean = m[i] + rest1 * (gradient - m[i]);
    const real square = finite(v[i] + rest2 * (gradient * gradient - v[i]));  // m / ∞ would be no step, unseen
    const real step = mean / correct1 / (root(square / correct2) + epsilon);
    m[i] = mean;
    v[i] = square;
    p[i] = narrow(before - learning_rate * (step + decay * before));
}
