"""NumPy dressed as CuPy 14.2, to find without a GPU what CuPy would refuse.

Its arrays don't mix with NumPy's, its functions that make arrays have no ``device``, it has no
longdouble, sorts take ``kind``, not ``stable``, what NumPy returns as a scalar is an array without
axes, and sums have another order than NumPy's. Of bfloat16 it adds in pairs, rounded each time, and
sums in float32, rounded once; a Python float or a `where` makes it float32, and stacks of products
and sorts of it are refused. Its cuBLAS has one function, on bare addresses, as
NVIDIA's document defines it. Each copy to the host is noted in `COPIES`. Streams do all at once, a
graph launched again does nothing, and every event lies 1 ms after the one before. `Runtime.error`
is a CUDA error that stays, as after an illegal access: whatever waits for the device raises it.
"""

from __future__ import annotations

import ctypes
import types
from collections import Counter
from contextlib import nullcontext
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

MISSING = ("longdouble", "clongdouble", "einsum_path", "float128")
REFUSED = {name: {"device"} for name in ("arange", "asarray", "empty", "full", "ones", "zeros")} | {
    "argsort": {"stable"}
}


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
COPIES: list[str] = []  # by which method each came about


class ndarray(np.ndarray):
    """An array on the pretended device."""

    @property
    def device(self) -> Any:
        return nullcontext()

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> np.ndarray:
        COPIES.append("get")
        Runtime.deviceSynchronize()
        return np.array(self.view(np.ndarray))

    def tolist(self) -> Any:
        COPIES.append("tolist")
        return here(self).tolist()

    def item(self, *args: Any) -> Any:
        COPIES.append("item")
        return here(self).item(*args)

    def __bool__(self) -> bool:
        COPIES.append("bool")
        return bool(here(self))

    def __int__(self) -> int:
        COPIES.append("int")
        return int(here(self))

    def __float__(self) -> float:
        COPIES.append("float")
        return float(here(self))

    def __index__(self) -> int:
        COPIES.append("index")
        return here(self).__index__()

    def __getitem__(self, key: Any) -> Any:
        return there(here(self)[here(key)])

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(
        self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any
    ) -> Any:
        if any(type(x) is np.ndarray for x in inputs):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        if ufunc is np.matmul:
            expect_products(inputs)
        if any(isinstance(x, float) for x in inputs):
            inputs = tuple(map(widened, inputs))
        count(f"{ufunc.__name__}.{method}", inputs)
        if out is not None:
            kwargs["out"] = tuple(here(x) for x in out)
        result = there(
            getattr(ufunc, method)(*map(here, inputs), **{k: here(v) for k, v in kwargs.items()})
        )
        return result if out is None else out[0]

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was called on a CuPy array")


ndarray.__module__ = "cupy"
# Calls of CuPy's functions, by name and types: CuPy compiles about two kernels for each of these
CALLS: Counter[str] = Counter()
NO_KERNELS = (
    *("asarray", "broadcast_arrays", "broadcast_to", "empty", "empty_like", "expand_dims"),
    *("finfo", "isdtype", "matrix_transpose", "moveaxis", "permute_dims", "reshape"),
    *("result_type", "squeeze", "swapaxes", "transpose"),
)


def count(name: str, inputs: Any) -> None:
    """One call of a function that launches a kernel."""
    if name not in NO_KERNELS:
        types_of = (str(x.dtype) if hasattr(x, "dtype") else type(x).__name__ for x in inputs)
        CALLS[f"{name}({', '.join(types_of)})"] += 1


def here(x: Any) -> Any:
    """As NumPy's own."""
    if isinstance(x, ndarray):
        return np.ndarray.view(x, np.ndarray)
    return type(x)(map(here, x)) if type(x) in (tuple, list) else x


def there(x: Any) -> Any:
    """As the pretended library's."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x).view(ndarray)
    return type(x)(map(there, x)) if type(x) in (tuple, list) else x


def widened(x: Any) -> Any:
    """In float32, if it is bfloat16."""
    return x.astype(np.float32) if getattr(x, "dtype", None) == BFLOAT16 else x


def expect_products(inputs: Any) -> None:
    """Stacks of products take the types of cuBLAS's older functions."""
    if any(x.dtype == BFLOAT16 for x in inputs) and max(x.ndim for x in inputs) > 2:
        raise TypeError("dtype is not supported: bfloat16")


def where(condition: Any, *values: Any) -> Any:
    """`numpy.where`, which has no bfloat16 in CuPy: it is cast to float32."""
    return np.where(condition, *map(widened, values))


def halves(
    x: np.ndarray, axis: int | None = None, dtype: Any = None, keepdims: bool = False
) -> Any:
    """`numpy.sum` in the order of CuPy's reductions: the second half onto the first, until one
    number is left."""
    if dtype is not None:
        x = x.astype(dtype)
    if x.dtype == BFLOAT16:
        return np.asarray(halves(widened(x), axis, keepdims=keepdims)).astype(BFLOAT16)
    if x.dtype.kind not in "fc" or 0 in x.shape or x.ndim == 0:
        return np.sum(x, axis=axis, keepdims=keepdims)
    rows = np.moveaxis(x, axis, 0) if axis is not None else x.reshape(-1)
    lanes = np.zeros((1 << (len(rows) - 1).bit_length(), *rows.shape[1:]), x.dtype)
    lanes[: len(rows)] = rows
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes.reshape(np.sum(x, axis=axis, keepdims=keepdims).shape)


class CuBLAS:
    """As much of ``cupy.cuda.cublas`` as kernels' host side calls; the numbers are those of its
    enumerations."""

    CUBLAS_OP_N = 0
    CUBLAS_OP_T = 1
    CUBLAS_GEMM_DEFAULT = -1
    CUBLAS_COMPUTE_32F = 68
    CUBLAS_COMPUTE_64F = 70
    TYPES: ClassVar = {
        0: np.dtype(np.float32),
        1: np.dtype(np.float64),
        14: np.dtype(ml_dtypes.bfloat16),
    }
    ALLOWED: ClassVar = {
        (68, 14, 14),
        (68, 14, 0),
        (68, 0, 0),
        (70, 1, 1),
    }  # compute type, of A and B, of C

    def __init__(self) -> None:
        self.mode, self.calls = 0, list[tuple[int, ...]]()

    def getMathMode(self, handle: int) -> int:
        return self.mode

    def setMathMode(self, handle: int, mode: int) -> None:
        self.mode = mode

    def gemmEx(
        self,
        handle: int,
        transa: int,
        transb: int,
        m: int,
        n: int,
        k: int,
        alpha: int,
        A: int,
        Atype: int,
        lda: int,
        B: int,
        Btype: int,
        ldb: int,
        beta: int,
        C: int,
        Ctype: int,
        ldc: int,
        computeType: int,
        algo: int,
    ) -> None:
        """C = α op(A) op(B) + β C with op(A) [m, k], op(B) [k, n] and C [m, n], column after column
        in memory."""
        assert handle == HANDLE
        assert self.mode == 16, "sums of a bfloat16 result would be rounded to bfloat16"
        assert algo == self.CUBLAS_GEMM_DEFAULT
        assert min(m, n, k) > 0
        assert Atype == Btype
        assert (computeType, Atype, Ctype) in self.ALLOWED
        real = np.dtype(np.float64 if computeType == self.CUBLAS_COMPUTE_64F else np.float32)
        a = columns(A, self.TYPES[Atype], *((k, m) if transa else (m, k)), lda).astype(real)
        b = columns(B, self.TYPES[Btype], *((n, k) if transb else (k, n)), ldb).astype(real)
        c = columns(C, self.TYPES[Ctype], m, n, ldc)
        scale, keep = (columns(x, real, 1, 1, 1)[0, 0] for x in (alpha, beta))
        found = scale * ((a.T if transa else a) @ (b.T if transb else b))
        c[...] = found if keep == 0 else found + keep * c
        self.calls.append((transa, transb, m, n, k))

    def gemmStridedBatchedEx(
        self,
        handle: int,
        transa: int,
        transb: int,
        m: int,
        n: int,
        k: int,
        alpha: int,
        A: int,
        Atype: int,
        lda: int,
        strideA: int,
        B: int,
        Btype: int,
        ldb: int,
        strideB: int,
        beta: int,
        C: int,
        Ctype: int,
        ldc: int,
        strideC: int,
        batchCount: int,
        computeType: int,
        algo: int,
    ) -> None:
        """As many products, of matrices so many elements apart."""
        sizes = self.TYPES[Atype].itemsize, self.TYPES[Ctype].itemsize
        steps = strideA * sizes[0], strideB * sizes[0], strideC * sizes[1]
        for i in range(batchCount):
            a, b, c = (start + i * by for start, by in zip((A, B, C), steps, strict=True))
            left, right = (a, Atype, lda), (b, Btype, ldb)
            how = computeType, algo
            self.gemmEx(
                handle, transa, transb, m, n, k, alpha, *left, *right, beta, c, Ctype, ldc, *how
            )
            self.calls.pop()
        self.calls.append((transa, transb, m, n, k, batchCount))


def columns(address: int, dtype: np.dtype[Any], rows: int, width: int, step: int) -> np.ndarray:
    """The matrix [rows, width] at an address, one column ``step`` elements after the other."""
    assert step >= max(rows, 1), f"leading dimension {step} of a matrix of {rows} rows"
    size = ((width - 1) * step + rows) * dtype.itemsize
    memory = np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8).view(dtype)
    return np.lib.stride_tricks.as_strided(
        memory, (rows, width), (dtype.itemsize, step * dtype.itemsize)
    )


HANDLE = 1234


class CUDARuntimeError(RuntimeError):
    """As CuPy raises it."""


class Runtime:
    """As much of ``cupy.cuda.runtime`` as the host side, the benchmark and the tests call."""

    CUDA_R_32F = 0
    CUDA_R_64F = 1
    CUDA_R_16BF = 14
    CUDARuntimeError = CUDARuntimeError
    error: ClassVar[str | None] = None  # of the process, once there is one

    @classmethod
    def deviceSynchronize(cls) -> None:
        if cls.error is not None:
            raise CUDARuntimeError(cls.error)

    @staticmethod
    def getDeviceCount() -> int:
        return 1

    @staticmethod
    def getDeviceProperties(number: int) -> dict[str, Any]:
        return {"name": b"Pretended GPU", "l2CacheSize": 1}

    @staticmethod
    def runtimeGetVersion() -> int:
        return 13000

    @staticmethod
    def driverGetVersion() -> int:
        return 13000


class Stream:
    def __init__(self, non_blocking: bool = False) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...
    def synchronize(self) -> None:
        Runtime.deviceSynchronize()

    def begin_capture(self) -> None: ...
    def end_capture(self) -> Any:
        return types.SimpleNamespace(launch=lambda stream: None)


class Event:
    def record(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None:
        Runtime.deviceSynchronize()


class MemoryPool:
    malloc = None

    def total_bytes(self) -> int:
        return 512

    def free_all_blocks(self) -> None: ...


class Generator:
    """Of ``cupy.random``: NumPy's numbers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: there(getattr(self.rng, name)(*args, **kwargs))


class Pretended(types.ModuleType):
    """The module ``cupy``."""

    __version__ = "14.2.0"
    ndarray = ndarray

    def __init__(self, name: str) -> None:
        super().__init__(name)
        pool = MemoryPool()
        self.cuda = types.SimpleNamespace(
            Device=lambda: types.SimpleNamespace(
                id=0,
                compute_capability="90",
                attributes={"MaxSharedMemoryPerBlockOptin": 227 << 10},
            ),
            Event=Event,
            MemoryPool=MemoryPool,
            Stream=Stream,
            cublas=CuBLAS(),
            device=types.SimpleNamespace(get_cublas_handle=lambda: HANDLE),
            get_elapsed_time=lambda before, after: 1.0,
            runtime=Runtime,
            set_allocator=lambda allocator: None,
            using_allocator=lambda allocator: nullcontext(),
        )
        self.get_default_memory_pool = lambda: pool
        self.random = types.SimpleNamespace(default_rng=Generator)

    def __getattr__(self, name: str) -> Any:
        if name in MISSING or name.startswith("__"):
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        found = {"sum": halves, "where": where}.get(name) or getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            if refused := REFUSED.get(name, set()) & set(kwargs):
                raise TypeError(f"{name}() got an unexpected keyword argument {refused}")
            if name != "asarray" and any(type(x) is np.ndarray and x.ndim for x in args):
                raise TypeError(f"{name}: unsupported type <class 'numpy.ndarray'>")
            if name in ("argsort", "sort") and args[0].dtype == BFLOAT16:
                raise TypeError(f"{name}: unsupported type bfloat16")
            if name == "matmul":
                expect_products(args)
            count(name, args)
            return there(found(*map(here, args), **{k: here(v) for k, v in kwargs.items()}))

        return call
