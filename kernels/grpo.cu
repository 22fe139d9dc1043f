// GRPO and its family from log-probabilities, with every setting of the reference: a block an output. The
// loss's derivative comes with the loss, in `real`, so that the backward is a multiplication.
// Derivation: derivations/grpo.md.
#include "common.cuh"

// ratio, average and KL settings, as refimpl/kernels/grpo.py numbers them.
enum { TOKEN, SEQUENCE, SEQUENCE_MEAN };
enum { OF_SEQUENCES, OF_TOKENS, BY_CONSTANT };
enum { K1, K2, K3, UNBIASED };

struct Bounded {
    real value;
    bool inside;
};

// x stopped at ±most; NaN stays visible.
__device__ __forceinline__ Bounded bounded(real x, real most) {
    const bool above = x > most, below = x < -most;  // (grpo.13)
    return {above ? most : below ? -most : x, !(above || below)};
}

// What one output contributes: part[n] = Σ_t weight objective, and dlog_prob [N, T] of −Σ part. unclipped [N, T] and
// kept [N] are written, or read if replayed. has_old, has_reference: whether old and reference are given. `total` is
// what `average` divides by beside the output's own length. Grid: a block an output.
extern "C" __global__ void grpo_forward(real* part, real* dlog_prob, unsigned char* unclipped, unsigned char* kept,
                                        const storage* log_prob, const real* old, const real* reference,
                                        const unsigned char* mask, const real* advantages, int length,
                                        int replay_unclipped, int replay_kept, int ratio, int average, int kl,
                                        int kl_level, real total, real low, real high, real top, real kl_weight,
                                        real most_u, real most_k, real off_policy) {
    const int64 first = int64(blockIdx.x) * length;
    real size = 0, sum_ratio = 0, sum_u = 0;
    for (int t = threadIdx.x; t < length; t += blockDim.x) {
        const int64 i = first + t;
        if (!mask[i]) continue;
        size += 1;
        if (ratio != TOKEN || off_policy < infinity()) sum_ratio += widen(log_prob[i]) - old[i];
        if (kl_weight != 0 && kl_level != TOKEN) sum_u += reference[i] - widen(log_prob[i]);
    }
    size = block_sum(size);
    sum_ratio = block_sum(sum_ratio);
    sum_u = block_sum(sum_u);
    const real count = size > 0 ? size : real(1);
    const real a = size > 0 ? advantages[blockIdx.x] : real(0);  // an output without tokens has none
    const real weight_of_token = 1 / (average == OF_SEQUENCES ? total * count : total);
    const bool stays = replay_kept ? kept[blockIdx.x] != 0 : a >= 0 || !(-sum_ratio / count > off_policy);
    if (!replay_kept && threadIdx.x == 0) kept[blockIdx.x] = stays;

    real sum = 0, sum_dz = 0, sum_du = 0;
    for (int t = threadIdx.x; t < length; t += blockDim.x) {
        const int64 i = first + t;
        const bool real_token = mask[i] != 0;
        const real weight = real_token ? weight_of_token : real(0);  // (grpo.1); 0 · NaN stays NaN below
        const real own_log_prob = real_token ? widen(log_prob[i]) : real(0);
        real z = 0;
        if (real_token)
            z = ratio == TOKEN ? own_log_prob - old[i] : ratio == SEQUENCE ? sum_ratio : sum_ratio / count;  // (grpo.2)
        const real rho = exponential(z);
        bool flows;
        if (replay_unclipped) {
            flows = unclipped[i] != 0;
        } else {
            const bool stopped = a > 0 ? rho > high : rho < low || rho > top;  // (grpo.3)
            flows = !stopped || a == 0;
            unclipped[i] = flows;
        }
        flows = flows && a != 0 && stays;
        const real bound = a > 0 ? high : rho > 1 && top < infinity() ? top : low;
        const real keep = stays ? real(1) : real(0);
        real objective = keep * a * (flows ? rho : bound);                                          // (grpo.4)
        real dz = -weight * keep * a * (flows ? rho : real(0)), du = 0;                             // (grpo.5)
        if (kl_weight != 0) {
            const real u_free = !real_token ? real(0) : kl_level == TOKEN ? reference[i] - own_log_prob : sum_u;
            const Bounded u = bounded(u_free, most_u);
            const real grown = exponential_minus_1(u.value);  // e^u − 1 keeps the digits that k3 cancels near u = 0
            const real free = kl == K1 ? -u.value : kl == K2 ? u.value * u.value / 2 : grown - u.value;  // (grpo.6)
            const Bounded k = bounded(free, most_k);
            const real line = 0 * u.value - 1;  // −1, and NaN where u is none
            const real slope = !(u.inside && k.inside) ? real(0) : kl == K1 ? line : kl == K2 ? u.value : grown;
            const real by = kl == UNBIASED ? weight * kl_weight * rho : weight * kl_weight;
            objective -= kl == UNBIASED ? kl_weight * rho * k.value : kl_weight * k.value;
            if (kl == UNBIASED) dz += by * k.value;  // (grpo.8)
            du = by * slope;                         // (grpo.7)
        }
        sum += weight * objective;
        sum_dz += dz;
        sum_du += du;
        const real own = (ratio == TOKEN ? dz : real(0)) - (kl_level == TOKEN ? du : real(0));  // (grpo.11)
        dlog_prob[i] = real_token ? own : real(0);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
    if (ratio == TOKEN && kl_level == TOKEN) return;  // else every token gets its part of what whole outputs add
    sum_dz = block_sum(sum_dz);
    sum_du = block_sum(sum_du);
    const real dz_all = ratio == TOKEN ? real(0) : ratio == SEQUENCE ? sum_dz : sum_dz / count;  // (grpo.10)
    const real du_all = kl_level == TOKEN ? real(0) : sum_du;
    for (int t = threadIdx.x; t < length; t += blockDim.x)
        if (mask[first + t]) dlog_prob[first + t] += dz_all - du_all;
}

// loss = −Σ part, in order. Grid: one block.
extern "C" __global__ void grpo_loss(real* loss, const real* part, int64 outputs) {
    real sum = 0;
    for (int64 n = threadIdx.x; n < outputs; n += blockDim.x) sum += part[n];
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[0] = -sum;  // (grpo.9)
}
