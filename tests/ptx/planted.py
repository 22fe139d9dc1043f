"""Small kernels in CUDA C, each right, and the mistakes that the interpreter must catch in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
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
SCAN = """extern "C" __global__ void k(const float* x, float* y, int n) {
    const int i = threadIdx.x;
    float v = x[i];
    for (int o = 1; o < 32; o *= 2) {
        const float other = __shfl_up_sync(~0u, v, o);
        if (i % 32 >= o) v += other;
    }
    y[i] = v;
}"""
# A [32, K] B [K, 16] in bfloat16, which x holds one after the other; K may end within a step of 16. A warp makes 16 rows.
TILES = """extern "C" __global__ void k(const float* x, float* y, int n) {
    __shared__ __align__(16) unsigned short a[2][32][24], b[2][16][24];
    const int t = threadIdx.x, warp = t / 32, lane = t % 32, width = n / 24, steps = (width + 15) / 16;
    const unsigned short *left = reinterpret_cast<const unsigned short*>(x), *right = left + 32 * width;
    auto shared = [](const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); };
    auto copy = [&](void* to, const void* from, bool inside) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                     :: "r"(shared(to)), "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0) : "memory");
    };
    auto fetch = [&](int step) {
        const int row = t / 2, column = t % 2 * 8, first = step * 16;
        copy(&a[step % 2][row][column], left + row * width + first + column, first + column < width);
        if (t < 32) copy(&b[step % 2][row][column], right + (first + row) * 16 + column, first + row < width);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    auto multiply = [](float (&d)[4], unsigned (&p)[4], unsigned q0, unsigned q1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q0), "r"(q1));
    };
    float d[2][4] = {};
    fetch(0);
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) fetch(step + 1);
        if (step + 1 < steps) asm volatile("cp.async.wait_group 1;" ::: "memory");
        else asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        unsigned p[4], q[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(p[0]), "=r"(p[1]), "=r"(p[2]), "=r"(p[3])
                     : "r"(shared(&a[step % 2][warp * 16 + lane % 16][lane / 16 * 8])) : "memory");
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3])
                     : "r"(shared(&b[step % 2][lane % 16][lane / 16 * 8])) : "memory");
        multiply(d[0], p, q[0], q[1]);
        multiply(d[1], p, q[2], q[3]);
        __syncthreads();
    }
    for (int j = 0; j < 2; j++)
        for (int i = 0; i < 4; i++)
            y[(warp * 16 + lane / 4 + i / 2 * 8) * 16 + j * 8 + lane % 4 * 2 + i % 2] = d[j][i];
}"""
# P [16, 16], float32 rounded to bfloat16 in registers, times V [16, 8] in bfloat16, which lies behind it in x.
PACKED = """extern "C" __global__ void k(const float* x, float* y, int n) {
    __shared__ __align__(16) unsigned short v[16][8];
    const int lane = threadIdx.x, row = lane / 4, column = lane % 4 * 2;
    if (lane < 16) *reinterpret_cast<float4*>(v[lane]) = reinterpret_cast<const float4*>(x + 256)[lane];
    __syncwarp();
    auto pack = [](unsigned& packed, const float* pair) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(pair[1]), "f"(pair[0]));
    };
    unsigned p[4], q[2];
    pack(p[0], x + row * 16 + column);
    pack(p[1], x + (row + 8) * 16 + column);
    pack(p[2], x + row * 16 + column + 8);
    pack(p[3], x + (row + 8) * 16 + column + 8);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(q[0]), "=r"(q[1])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(v[lane % 16]))) : "memory");
    float d[4];
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q[0]), "r"(q[1]), "f"(0.f));
    y[row * 8 + column] = d[0]; y[row * 8 + column + 1] = d[1];
    y[(row + 8) * 8 + column] = d[2]; y[(row + 8) * 8 + column + 1] = d[3];
}"""


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of x in bfloat16, two numbers a float32."""
    return x.astype(ml_dtypes.bfloat16).ravel().view(np.float32)


def numbers(x: np.ndarray) -> np.ndarray:
    """The numbers whose bits these are."""
    return x.view(ml_dtypes.bfloat16).astype(np.float64)


FLOATS = np.random.default_rng(7).standard_normal(2048).astype(np.float32)
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
    "scan": Case(source=SCAN, x=FLOATS[:64], size=64, grid=1, block=64, wanted=lambda x: x.reshape(2, 32).cumsum(1).ravel()),
    "tiles": Case(
        source=TILES, x=bits(FLOATS[: 48 * 40]), size=32 * 16, grid=1, block=64,
        wanted=lambda x: (numbers(x)[: 32 * 40].reshape(32, 40) @ numbers(x)[32 * 40 :].reshape(40, 16)).ravel(),
    ),
    "packed": Case(
        source=PACKED, x=np.r_[FLOATS[:256], bits(FLOATS[256:384])], size=128, grid=1, block=32,
        wanted=lambda x: (numbers(bits(x[:256])).reshape(16, 16) @ numbers(x[256:]).reshape(16, 8)).ravel(),
    ),
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
    "scan's lane": ("scan", "i % 32 >= o", "i % 32 > o", WRONG),
    "endless loop": ("scan", "o *= 2", "o *= 1", "endless loop"),
    "no wait for a tile": ("tiles", 'asm volatile("cp.async.wait_group 1;" ::: "memory");', ";", "in flight"),
    "no wait for the last tile": ("tiles", "wait_group 0", "wait_group 1", "in flight"),
    "no barrier after a tile's wait": ("tiles", "        __syncthreads();\n        unsigned", "        unsigned", "in flight|race"),
    "tile overwritten early": ("tiles", "        __syncthreads();\n    }", "    }", "race: writes shared"),
    "tile not committed": ("tiles", "cp.async.commit_group", "// cp.async.commit_group", "in flight"),
    "stage that is still in flight": ("tiles", "a[step % 2][warp", "a[(step + 1) % 2][warp", "in flight"),
    "stale stage": ("tiles", "b[step % 2][lane", "b[step + 1 < steps ? step % 2 : 1][lane", WRONG),
    "both tiles in one stage": ("tiles", "copy(&b[step % 2]", "copy(&b[0]", "still in flight"),
    "row of a lane's address": ("tiles", "warp * 16 + lane % 16", "warp * 16 + lane % 8", WRONG),
    "column of a lane's address": ("tiles", "lane / 16 * 8])) : \"memory\");\n        multiply", "lane / 8 * 8])) : \"memory\");\n        multiply", "ldmatrix.*never written"),
    "rows of the other warp": ("tiles", "warp * 16 + lane % 16", "lane % 16", WRONG),
    "rows at no multiple of 16 bytes": ("tiles", "a[2][32][24]", "a[2][32][20]", "16-byte access .* misaligned"),
    ".trans missing": ("tiles", "x4.trans", "x4", WRONG),
    ".trans too much": ("tiles", "x4.shared", "x4.trans.shared", WRONG),
    "A's registers 1 and 2": ("tiles", '"r"(p[1]), "r"(p[2])', '"r"(p[2]), "r"(p[1])', WRONG),
    "B's registers": ("tiles", "p, q[0], q[1]", "p, q[1], q[0]", WRONG),
    "columns of B's other part": ("tiles", "p, q[0], q[1]", "p, q[0], q[2]", WRONG),
    "step off by one": ("tiles", "left + row * width + first", "left + row * width + first + 16", WRONG),
    "last step dropped": ("tiles", "(width + 15) / 16", "width / 16", WRONG),
    "tail without zeros": ("tiles", "inside ? 16 : 0", "16", "out of bounds"),
    "tail one row late": ("tiles", "first + row < width", "first + row <= width", "out of bounds"),
    "sums begun anew": ("tiles", "        unsigned p[4], q[4];", "        unsigned p[4], q[4]; d[0][0] = 0;", WRONG),
    "result's row": ("tiles", "i / 2 * 8", "i % 2 * 8", WRONG),
    "mma of half a warp": ("tiles", "        multiply(d[0]", "        if (lane < 16) multiply(d[0]", r"mma\..*lanes missing"),
    "halves of a pair": ("packed", '"f"(pair[1]), "f"(pair[0])', '"f"(pair[0]), "f"(pair[1])', WRONG),
    "quarters of P": ("packed", "x + (row + 8) * 16 + column)", "x + row * 16 + column + 8)", WRONG),
    "no __syncwarp before ldmatrix": ("packed", "    __syncwarp();\n", "", "race: reads shared"),
    "rows of half a matrix": ("packed", "lane < 16) *", "lane < 12) *", "ldmatrix.*never written"),
    "one matrix twice": ("packed", "v[lane % 16]", "v[lane % 8]", WRONG),
    "untransposed V": ("packed", "x2.trans", "x2", WRONG),
}  # fmt: skip
