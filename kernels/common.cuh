// What all kernels share: number types, chunks of 16 bytes, reductions in a fixed order.
//
// One of STORAGE_FLOAT64, STORAGE_FLOAT32, STORAGE_BFLOAT16 is defined by refimpl/kernels/compile.py. `storage` is the
// type in memory, `real` the one that arithmetic is done in. There are no atomics: two runs give the same bits.
#pragma once

#if defined(STORAGE_FLOAT64)
typedef double storage;
typedef double real;
#elif defined(STORAGE_FLOAT32)
typedef float storage;
typedef float real;
#elif defined(STORAGE_BFLOAT16)
struct storage { unsigned short bits; };
typedef float real;
#else
#error "one of STORAGE_FLOAT64, STORAGE_FLOAT32 and STORAGE_BFLOAT16 must be defined"
#endif

typedef long long int64;

constexpr int VECTOR = 16 / sizeof(storage);  // elements of a chunk: the widest access that a thread can make
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

#define INFINITY_ (__longlong_as_double(0x7ff0000000000000ll))

// 16 bytes as they lie in memory. Nothing waits for a load until an element is used, so load all chunks before that.
struct Chunk {
    unsigned word[4];

    __device__ __forceinline__ storage get(int v) const {
#if defined(STORAGE_FLOAT64)
        return __hiloint2double(word[2 * v + 1], word[2 * v]);
#elif defined(STORAGE_FLOAT32)
        return __uint_as_float(word[v]);
#else
        return storage{static_cast<unsigned short>(word[v / 2] >> 16 * (v % 2))};
#endif
    }

    // Element v, which is 0 before.
    __device__ __forceinline__ void set(int v, storage x) {
#if defined(STORAGE_FLOAT64)
        word[2 * v] = __double2loint(x);
        word[2 * v + 1] = __double2hiint(x);
#elif defined(STORAGE_FLOAT32)
        word[v] = __float_as_uint(x);
#else
        word[v / 2] |= static_cast<unsigned>(x.bits) << 16 * (v % 2);
#endif
    }

    __device__ __forceinline__ real operator[](int v) const;  // element v, for arithmetic
};

// ---- one wrapper for each PTX instruction that CUDA C has no word for

// ld.global.nc.L1::no_allocate.L2::256B.v4.u32: 16 bytes that are read once. They pass L1 by, which stays free for data
// that is read again, and L2 fetches 256 bytes at a time, so that fewer requests reach memory. Legal only on data that
// nothing writes while the kernel runs (.nc), at addresses that are multiples of 16.
__device__ __forceinline__ Chunk ld_global_nc_stream(const void* address) {
    Chunk to;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
                 : "l"(__cvta_generic_to_global(address)));
    return to;
}

// ld.global.v4.u32 and st.global.v4.u32: 16 bytes in one access, at multiples of 16. Written out, because the compiler
// otherwise splits a chunk into as many accesses as it has elements.
__device__ __forceinline__ Chunk ld_global_v4(const void* address) {
    Chunk to;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
                 : "l"(__cvta_generic_to_global(address))
                 : "memory");
    return to;
}

__device__ __forceinline__ void st_global_v4(void* address, Chunk from) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(address)), "r"(from.word[0]), "r"(from.word[1]), "r"(from.word[2]),
                   "r"(from.word[3])
                 : "memory");
}

// ld.shared.v4.u32: 16 bytes of shared memory in one access, at multiples of 16.
__device__ __forceinline__ Chunk ld_shared_v4(const void* address) {
    Chunk to;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(address)))
                 : "memory");
    return to;
}

// cvt.rn.bf16.f32: to bfloat16, to the nearest, ties to even. One instruction; in integer arithmetic it is five. sm_80 on.
__device__ __forceinline__ unsigned short cvt_rn_bf16(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// ex2.approx.ftz.f32: 2^x within 2 units of float32 (2^-22 relative), in one instruction of the special function unit,
// where exp2f is that and a correction of its range. Subnormal x is 0, and a subnormal result too: legal where such small
// numbers may vanish.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// rcp.approx.ftz.f32: 1 / x within a unit of float32 (2^-23 relative), in one instruction of the special function unit,
// where a division is about ten and a call for numbers near the ends of the range. 1 / 0 is ∞. Subnormal x is 0, and a
// subnormal result too (|x| > 2^126).
__device__ __forceinline__ float rcp_approx_ftz(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// cp.async.cg.shared.global.L2::128B: 16 bytes from global to shared memory on their way while the thread goes on, past
// its registers and past L1. Only the first `bytes` (0 to 16) are read, the rest are zeros. Legal at addresses that are
// multiples of 16. The bytes may be neither read nor written until this thread has waited (cp_async_wait), and by other
// threads not before a barrier after that. sm_80 on.
__device__ __forceinline__ void cp_async_16(void* shared_to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_to))),
                   "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
}

// cp.async.commit_group: this thread's copies since the last commit become a group, which may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: waits until at most the N youngest of this thread's groups are on their way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#if defined(STORAGE_BFLOAT16)
// cvt.rn.bf16x2.f32: two numbers in one instruction, `low` in the lower half, which lies first in memory. sm_80 on.
__device__ __forceinline__ unsigned cvt_rn_bf16x2(float high, float low) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// The next three are of a whole warp: all 32 lanes must execute the very same call together. Lane i has the row i / 4
// and the pair of columns 2 (i % 4) in each 8 × 8 part of a matrix; the lower half of a register is the left element.

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d += A B of tensor cores, A 16 × 16, B 16 × 8, d 16 × 8 in
// float32: 2,048 multiply-adds. a: the upper left, lower left, upper right and lower right part of A. b0, b1: the upper
// and lower half of B, whose pairs lie along its columns (so Bᵀ as A). d: row i / 4, then row i / 4 + 8, two columns each.
// sm_80 on.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four matrices of 8 × 8 from shared memory to such parts, r[m] of matrix m, in
// one instruction for what would be 4 loads of a lane. Lane i gives the address of row i % 8 of matrix i / 8: 16 bytes at
// a multiple of 16. Free of bank conflicts where the 8 rows of a matrix lie in different eighths of 128 bytes, as they do
// if a row of the array is an odd number of 16 bytes long.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_address)))
                 : "memory");
}

// The same, each matrix transposed: lane i gets rows 2 (i % 4) and 2 (i % 4) + 1 of column i / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_address)))
                 : "memory");
}
#endif

// ---- between storage and arithmetic

#if defined(STORAGE_BFLOAT16)
__device__ __forceinline__ real widen(storage x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ storage narrow(real x) { return storage{cvt_rn_bf16(x)}; }
#else
__device__ __forceinline__ real widen(storage x) { return x; }
__device__ __forceinline__ storage narrow(real x) { return x; }
#endif

__device__ __forceinline__ real Chunk::operator[](int v) const { return widen(get(v)); }

// Chunk k: elements i + k step … i + k step + VECTOR − 1 of a row of `length`, 0 past its end. `wide` says that the row
// starts at a multiple of 16 bytes and, as i and step, is a whole number of chunks long: then each chunk is one access
// of 16 bytes, and all are on their way before anything is waited for; else there is one access for each element.
// STREAM: no kernel in flight writes the row and it is read once.
template <bool STREAM, int COUNT>
__device__ __forceinline__ void load_chunks(Chunk (&chunk)[COUNT], const storage* row, int i, int step, int length,
                                            bool wide) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) chunk[k] = {};
    if (wide) {
#pragma unroll
        for (int k = 0; k < COUNT; k++, i += step)
            if (i < length) chunk[k] = STREAM ? ld_global_nc_stream(row + i) : ld_global_v4(row + i);
    } else {
#pragma unroll
        for (int k = 0; k < COUNT; k++, i += step)
#pragma unroll
            for (int v = 0; v < VECTOR; v++)
                if (i + v < length) chunk[k].set(v, row[i + v]);
    }
}

// The one chunk at i.
template <bool STREAM>
__device__ __forceinline__ Chunk load_chunk(const storage* row, int i, int length, bool wide) {
    Chunk chunk[1];
    load_chunks<STREAM>(chunk, row, i, 0, length, wide);
    return chunk[0];
}

__device__ __forceinline__ void store_chunk(Chunk chunk, storage* row, int i, int length, bool wide) {
    if (wide && i < length) {
        st_global_v4(row + i, chunk);
    } else {
#pragma unroll
        for (int v = 0; v < VECTOR; v++)
            if (i + v < length) row[i + v] = chunk.get(v);
    }
}

__device__ __forceinline__ void store_chunk(const real (&x)[VECTOR], storage* row, int i, int length, bool wide) {
    Chunk chunk = {};
#pragma unroll
    for (int v = 0; v < VECTOR; v++) chunk.set(v, narrow(x[v]));
    store_chunk(chunk, row, i, length, wide);
}

// ---- tiles in shared memory, and accumulators of 16 × 8 in the registers of a warp

// A lane holds 4 of the 16 × 8 numbers of an accumulator: of rows r and r + 8, columns c and c + 1.
__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int row_of(int i) { return lane() / 4 + i / 2 * 8; }
__device__ __forceinline__ int column_of(int i) { return lane() % 4 * 2 + i % 2; }

// Starts to copy VECTOR numbers of a row of `width`, from `column` on, to a tile: 0 past its end, and all 0 if not
// `inside`. In 16 bytes that need a cp_async_wait if the row is `wide`, else number by number.
template <class Index>
__device__ __forceinline__ void fetch_chunk(storage* to, const storage* from, Index column, int width, bool inside,
                                            bool wide) {
    if (wide) {
        cp_async_16(to, from, inside ? 16 : 0);
    } else {
#pragma unroll
        for (int v = 0; v < VECTOR; v++) to[v] = inside && column + v < width ? from[v] : storage{};
    }
}

// ---- functions of one number

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float exponential_minus_1(float x) { return expm1f(x); }
__device__ __forceinline__ double exponential_minus_1(double x) { return expm1(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ real infinity() { return static_cast<real>(INFINITY_); }

// e^x for x ≤ 0, a weight of a softmax. Where it becomes bfloat16, by ex2.approx, whose error is small beside that rounding.
__device__ __forceinline__ real weight_of(real x) {
#if defined(STORAGE_BFLOAT16)
    return ex2_approx_ftz(x * 1.4426950408889634f);
#else
    return exponential(x);
#endif
}

// x where it is finite, else NaN: 1 / ∞ would make of an overflow a 0 that nobody can tell from a right one.
__device__ __forceinline__ real finite(real x) { return x + (x - x); }

// 1 / (1 + e^-x), without overflow on either side.
__device__ __forceinline__ real sigmoid(real x) {
    const real z = exponential(x < 0 ? x : -x);
    return (x < 0 ? z : real(1)) / (1 + z);
}

// ---- reductions; every lane, or every thread, gets the same bits

__device__ __forceinline__ real warp_sum(real x) {
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2) x += __shfl_xor_sync(ALL_LANES, x, other);
    return x;
}

__device__ __forceinline__ real warp_max(real x) {
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2) {
        const real y = __shfl_xor_sync(ALL_LANES, x, other);
        x = y > x ? y : x;
    }
    return x;
}

// The sum over the block, whose size is a multiple of 32. All threads must call it.
__device__ __forceinline__ real block_sum(real x) {
    __shared__ real part[WARP];
    x = warp_sum(x);
    __syncthreads();  // an earlier call may still be read
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    real total = 0;
    for (unsigned warp = 0; warp < blockDim.x / WARP; warp++) total += part[warp];
    return total;
}

// Adds x over the lanes (c, 0), (c, 1), … of a block (32, LANES), in this order; lane (c, 0) gets the sum. All threads
// must call it, once.
template <int LANES, int COUNT>
__device__ __forceinline__ void sum_lanes(real (&x)[COUNT]) {
    __shared__ real part[LANES][COUNT][WARP];
#pragma unroll
    for (int v = 0; v < COUNT; v++) part[threadIdx.y][v][threadIdx.x] = x[v];
    __syncthreads();
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int lane = 1; lane < LANES; lane++)
#pragma unroll
        for (int v = 0; v < COUNT; v++) x[v] += part[lane][v][threadIdx.x];
}
