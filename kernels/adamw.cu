// AdamW in one pass: four arrays read, three written (of bfloat16 four), nothing else touches memory.
// refimpl/optimizer.py is its reference. Parameters are in storage type; gradient and moments in `real`, as weight
// gradients are, and so is the master that a bfloat16 parameter is the rounding of. Other types are their own master:
// the host passes one array twice.
#include "common.cuh"

// Grid: a thread an element. rest1 = 1 − β1 and rest2 = 1 − β2; correct1 = 1 − β1^step and correct2 likewise.
extern "C" __global__ void adamw_update(storage* p, real* m, real* v, const real* g, int64 size, real rest1, real rest2,
                                        real correct1, real correct2, real epsilon, real decay, real learning_rate,
                                        real* master) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const real gradient = g[i], before = master[i];
    const real mean = m[i] + rest1 * (gradient - m[i]);
    const real square = finite(v[i] + rest2 * (gradient * gradient - v[i]));  // m / ∞ would be no step, unseen
    const real step = mean / correct1 / (root(square / correct2) + epsilon);
    m[i] = mean;
    v[i] = square;
    const real after = before - learning_rate * (step + decay * before);
    master[i] = after;
    p[i] = narrow(after);
}
