"""Small kernels in CUDA C, each right, and the mistakes that the interpreter must catch in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """A kernel k(x, y, n): its input, the size of y, the launch, and y in NumPy."""

    source: str
    x: np.ndarray
    size: int
    grid: int
    block: int
    wanted: Callable[[np.ndarray], Any]


SUM = """extern "C" __global__ void k(const float* x, float* y, int n) {
    __shared__ float part[4];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float v = i < n ? x[i] : 0.f;
    for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) y[blockIdx.x] = part[0] + part[1] + part[2] + part[3];
}"""
SHIFT = """extern "C" __global__ void k(const float* x, float* y, int n) {
    __shared__ float s[128];
    const int t = threadIdx.x, i = blockIdx.x * 128 + t;
    s[t] = i < n ? x[i] : 0.f;
    __syncthreads();
    const float next = s[t < 127 ? t + 1 : t];
    __syncthreads();
    s[t] = next;
    __syncthreads();
    if (i < n) y[i] = s[t] + s[127 - t];
}"""
STAGED = """extern "C" __global__ void k(const float* __restrict__ x, float* y, int n) {
    __shared__ __align__(16) float s[2][512];
    const int t = threadIdx.x;
    float sum = 0;
    auto fetch = [&](int stage) {
        unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(&s[stage % 2][4 * t]));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(x + stage * 512 + 4 * t) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    fetch(0);
    for (int stage = 0; stage < 4; stage++) {
        if (stage + 1 < 4) fetch(stage + 1);
        if (stage + 1 < 4) asm volatile("cp.async.wait_group 1;" ::: "memory");
        else asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        for (int j = 0; j < 4; j++) sum += s[stage % 2][(4 * t + 37 + j) % 512];
        __syncthreads();
    }
    y[t] = sum;
}"""
COPY4 = """extern "C" __global__ void k(const float* x, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * i + 3 < n) reinterpret_cast<float4*>(y)[i] = reinterpret_cast<const float4*>(x)[i];
}"""
STRIDE = """extern "C" __global__ void k(const float* x, float* y, int n) {
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
    atomicAdd(y, sum);
}"""
COUNT = """extern "C" __global__ void k(const int* x, int* y, int n) {
    __shared__ int bins[8];
    if (threadIdx.x < 8) bins[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&bins[x[i] & 7], 1);
    __syncthreads();
    if (threadIdx.x < 8) y[threadIdx.x] = bins[threadIdx.x];
}"""
WARP = """extern "C" __global__ void k(const float* x, float* y, int n) {
    __shared__ float s[4][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    s[warp][lane] = x[threadIdx.x];
    __syncwarp();
    y[threadIdx.x] = s[warp][31 - lane];
}"""
LOCAL = """extern "C" __global__ void k(const int* x, int* y, int n) {
    int stack[16];
    for (int i = 0; i < 16; i++) stack[x[i] & 15] = i * i;
    y[threadIdx.x] = stack[x[threadIdx.x] & 15];
}"""
SCAN = """extern "C" __global__ void k(const float* x, float* y, int n) {
    const int i = threadIdx.x;
    float v = x[i];
    for (int o = 1; o < 32; o *= 2) {
        const float other = __shfl_up_sync(~0u, v, o);
        if (i % 32 >= o) v += other;
    }
    y[i] = v;
}"""
FLOATS = np.random.default_rng(7).standard_normal(2048).astype(np.float32)
INTS = np.arange(16, dtype=np.int32)[::-1].copy()
CASES: dict[str, Case] = {
    "sum": Case(source=SUM, x=FLOATS[:250], size=2, grid=2, block=128, wanted=lambda x: [x[:128].sum(), x[128:].sum()]),
    "shift": Case(
        source=SHIFT, x=FLOATS[:128], size=128, grid=1, block=128,
        wanted=lambda x: (lambda s: s + s[::-1])(np.r_[x[1:], x[-1:]]),
    ),
    "staged": Case(
        source=STAGED, x=FLOATS, size=128, grid=1, block=128,
        wanted=lambda x: [x.reshape(4, 512)[:, (4 * t + 37 + np.arange(4)) % 512].sum() for t in range(128)],
    ),
    "copy": Case(source=COPY4, x=FLOATS[:500], size=500, grid=2, block=64, wanted=lambda x: x),
    "stride": Case(source=STRIDE, x=FLOATS[:1000], size=1, grid=3, block=64, wanted=lambda x: [x.sum()]),
    "count": Case(source=COUNT, x=np.arange(300, dtype=np.int32) ** 2, size=8, grid=1, block=96, wanted=lambda x: np.bincount(x & 7, minlength=8)),
    "warp": Case(source=WARP, x=FLOATS[:128], size=128, grid=1, block=128, wanted=lambda x: x.reshape(4, 32)[:, ::-1].ravel()),
    "local": Case(source=LOCAL, x=INTS, size=16, grid=1, block=16, wanted=lambda x: (15 - x) ** 2),
    "scan": Case(source=SCAN, x=FLOATS[:64], size=64, grid=1, block=64, wanted=lambda x: x.reshape(2, 32).cumsum(1).ravel()),
}  # fmt: skip
WRONG = "a wrong result"
# name: (kernel, its right words, the wrong ones, what the error says)
BUGS: dict[str, tuple[str, str, str, str]] = {
    "missing barrier": ("sum", "    __syncthreads();\n", "", "never written|race"),
    "read past the end": ("sum", "i < n ?", "i <= n ?", "out of bounds: global byte 1000"),
    "lane of the shuffle": ("sum", "o > 0;", "o > 1;", WRONG),
    "warp that adds nothing": ("sum", "% 32 == 0", "% 64 == 0", r"ld\.shared.*never written"),
    "shuffle in divergent code": ("sum", "float v = i < n ? x[i] : 0.f;", "if (i >= n) return; float v = x[i];", "which is not there"),
    "shared memory too small": ("sum", "part[4]", "part[3]", "out of bounds: shared byte 12"),
    "result of all blocks in one place": ("sum", "y[blockIdx.x]", "y[0]", "race: "),
    "read while others write": ("shift", "    __syncthreads();\n    s[t] = next;", "    s[t] = next;", "race: writes shared"),
    "write not awaited": ("shift", "s[t] = next;\n    __syncthreads();", "s[t] = next;", "race: reads shared"),
    "one past the shared array": ("shift", "t < 127 ? t + 1 : t", "t + 1", "out of bounds: shared byte 512"),
    "barrier in divergent code": ("sum", "    __syncthreads();", "    if (threadIdx.x % 32 < 16) __syncthreads();", "barrier in divergent code"),
    "barrier for half of the block": ("shift", "    __syncthreads();\n    s[t] = next;", "    if (t < 64) __syncthreads();\n    s[t] = next;", "race"),
    "barrier for too many": ("sum", "__syncthreads();", 'asm volatile("bar.sync 0, 160;" ::: "memory");', "deadlock: 128 threads of 160"),
    "no wait for cp.async": ("staged", 'asm volatile("cp.async.wait_group 1;" ::: "memory");', ";", "in flight"),
    "wait for one group too few": ("staged", "wait_group 0", "wait_group 1", "in flight"),
    "no barrier after the wait": ("staged", "        __syncthreads();\n        for", "        for", "in flight|race"),
    "stage overwritten early": ("staged", "        __syncthreads();\n    }", "    }", "race: writes shared"),
    "cp.async of a wrong address": ("staged", "x + stage * 512 + 4 * t", "x + stage * 512 + 4 * t + 1", "16-byte access .* misaligned"),
    "vector access off by one": ("copy", "reinterpret_cast<const float4*>(x)[i]", "reinterpret_cast<const float4*>(x + 1)[i]", "misaligned"),
    "tail of a vector": ("copy", "4 * i + 3 < n", "4 * i - 3 < n", "out of bounds"),
    "elements counted twice": ("stride", "i += gridDim.x * blockDim.x", "i += blockDim.x", WRONG),
    "atomic missing": ("stride", "atomicAdd(y, sum);", "*y += sum;", "race|by the same instruction"),
    "shared atomic missing": ("count", "atomicAdd(&bins[x[i] & 7], 1)", "bins[x[i] & 7]++", "race|by the same instruction"),
    "counters not cleared": ("count", "threadIdx.x < 8) bins", "threadIdx.x < 7) bins", "never written"),
    "no __syncwarp": ("warp", "    __syncwarp();\n", "", "race: reads shared"),
    "read-only load of what is written": ("warp", "y[threadIdx.x] =", "y[threadIdx.x] = __ldg(y + threadIdx.x) +", "writes memory that this kernel reads by ld.global.nc"),
    "output read before it is written": ("warp", "y[threadIdx.x] =", "y[threadIdx.x] +=", r"ld\.global.*never written"),
    "local array not filled": ("local", "i < 16; i++) stack", "i < 15; i++) stack", r"ld\.local.*never written"),
    "scan's lane": ("scan", "i % 32 >= o", "i % 32 > o", WRONG),
    "endless loop": ("scan", "o *= 2", "o *= 1", "endless loop"),
}  # fmt: skip
