"""Products inside a kernel: what stands before and after them stays in the cache.

NumPy's product copies both factors into an order of its own at each call. For the few rows of an
expert, or the few columns of a head, that takes as long as multiplying. Here, in c = a b, a is read
where it lies, by any strides. b and c are in *panels*: `WIDTH` columns, two vectors, lie beside
each other, so a matrix [K, N] is an array [⌈N / WIDTH⌉, K, WIDTH]. What a kernel makes in that
order is the next product's b, without a copy.

`multiply` makes a tile of c at a time: `TALL` rows of one panel or, where there are registers for
it, `LONG` rows of two. All its sums are in registers: each step along K reads one row of each panel
of b and one number of each row of a, and adds the products. An element's sum runs along K in order,
`DEEP` steps at a time; these sums are added in order. So its bits depend neither on the tile nor on
the number of threads, but on the processor: on its fused multiply-add, on `DEEP`, and in
`outer_products` on `WIDTH`.

Letters: c [M, N] = a [M, K] b [K, N], P panels, WIDTH = `width_of(x)`. a may be [M, R, K / R]: K in
R pieces that lie apart, as where its columns are in panels.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, codegen, config
from numba.extending import intrinsic, overload
from numpy.lib.stride_tricks import as_strided

from .common_numba_cpu import CHECKED, EXACT


def _features():
    """Of what Numba compiles for: this processor's, or those that the user named to Numba."""
    told = config.CPU_FEATURES
    features = codegen.get_host_cpu_features() if told is None else told
    return {name[1:] for name in features.split(",") if name[:1] == "+"}


FEATURES = _features()
WIDE, ARM = "avx512f" in FEATURES, "neon" in FEATURES
BYTES = 64 if WIDE else 32 if "avx2" in FEATURES else 16  # of a vector
VECTORS = 2  # of a panel's row
TALL = 8 if WIDE or ARM else 6  # rows of a tile: with 32 registers or 16, all its sums are in them
LONG = 6 if WIDE else 1  # of a tile of two panels: fewer instructions per product than one has
DEEP = 128 if WIDE else 256  # steps along K per block: what a tile reads of b fits the first cache
SLAB = 256  # rows of a per block: DEEP × SLAB numbers fit the second cache
LINE = 64  # bytes, of the cache: as in memory.py
PANELS = 4  # of b that `multiply_rows` and `outer_products` pack at a time
FEW = 8  # rows, so few that to pack the other factor would take longer than to multiply
SOON = 2  # rows ahead are fetched where rows are gathered
GAP = 2  # unused steps between tiles: a power of two apart, they would share a place in the cache
SQUARE = 8  # side of what is transposed in registers
FUSED = "fma" in FEATURES or ARM  # a product and a sum are one instruction


def width_of(x):
    """Columns of a panel of x's type, in compiled code."""
    return VECTORS * BYTES // x.itemsize


@overload(width_of)
def _width_of(x):
    width = VECTORS * BYTES * 8 // x.dtype.bitwidth
    return lambda x: width


class _Code:
    """Writes LLVM's instructions on numbers of one type, at ``builder``'s place."""

    def __init__(self, context, builder, dtype):
        self.context, self.builder = context, builder
        self.real = context.get_data_type(dtype)
        self.align = self.real.get_abi_size(context.target_data)

    def array(self, kind, value):
        return self.context.make_array(kind)(self.context, self.builder, value)

    def strides(self, array):
        return cgutils.unpack_tuple(self.builder, array.strides)

    def integer(self, value):
        return ir.Constant(ir.IntType(64), value)

    def vector(self, lanes):
        return ir.VectorType(self.real, lanes)

    def moved(self, pointer, *distances):
        """The pointer, moved by count · bytes for each pair."""
        at = self.builder.bitcast(pointer, ir.IntType(8).as_pointer())
        for count, stride in distances:
            at = self.builder.gep(at, [self.builder.mul(count, stride)])
        return at

    def load(self, at, kind):
        loaded = self.builder.load(self.builder.bitcast(at, kind.as_pointer()))
        loaded.align = self.align
        return loaded

    def store(self, value, at):
        place = self.builder.bitcast(at, value.type.as_pointer())
        self.builder.store(value, place).align = self.align

    @contextmanager
    def steps(self, start, stop, step):
        """A loop, which gives its index."""
        kind = ir.IntType(64)
        with cgutils.for_range_slice(self.builder, start, stop, step, kind, inc=True) as (i, _):
            yield i

    def apart(self, pointer):
        """The same pointer, hidden from LLVM: otherwise it computes each row's address from the row
        before, and the loads wait."""
        kind = ir.FunctionType(pointer.type, [pointer.type])
        return self.builder.asm(kind, "", "=r,0", [pointer], side_effect=False)

    def fetch(self, at, write=False):
        """Begin to fetch the line of memory at ``at`` into the second cache, to read it or to
        write. Where there is none, nothing happens."""
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [at.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        to, second_cache, data = (ir.Constant(flag, n) for n in (int(write), 1, 1))
        self.builder.call(function, [at, to, second_cache, data])

    def broadcast(self, number, lanes):
        """A vector of one number."""
        undefined, lane = ir.Constant(self.vector(lanes), ir.Undefined), ir.IntType(32)
        one = self.builder.insert_element(undefined, number, ir.Constant(lane, 0))
        places = ir.Constant(ir.VectorType(lane, lanes), [0] * lanes)
        return self.builder.shuffle_vector(one, undefined, places)

    def add_product(self, a, b, total):
        """a b + total."""
        if not FUSED:
            return self.builder.fadd(self.builder.fmul(a, b), total)
        size = "f32" if self.align == 4 else "f64"
        kind = ir.FunctionType(a.type, [a.type] * 3)
        name = f"llvm.fma.v{a.type.count}{size}"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [a, b, total])


def _tile(height, panels=1, fetches=False):
    """The function that makes so many rows, from ``first`` on, of so many panels of c [P, M, WIDTH]
    from a [tiles, TALL, R, K / R] and b [P, K, WIDTH]. If ``apart``, c's next rows are fetched; if
    it ``fetches``, as many rows from ``first`` on and as many steps of ``ahead`` [n, R, m]."""

    @intrinsic
    def tile(typing, c, a, b, ahead, panel, first, add, apart):
        def code(context, builder, signature, arguments):
            emit = _Code(context, builder, signature.args[0].dtype)
            arrays = zip(signature.args[:4], arguments[:4], strict=True)
            c, a, b, ahead = (emit.array(kind, value) for kind, value in arrays)
            panel, first, add, apart = arguments[4:]
            own = [builder.add(panel, emit.integer(i)) for i in range(panels)]
            zero = ir.Constant(emit.vector(BYTES // emit.align), [0.0] * (BYTES // emit.align))
            sums = [
                [cgutils.alloca_once_value(builder, zero) for _ in range(panels * VECTORS)]
                for _ in range(height)
            ]
            with builder.if_then(apart):
                next_row = builder.add(first, emit.integer(height))
                for one in own:
                    by_panel, by_row, _ = emit.strides(c)
                    begin = emit.moved(c.data, (one, by_panel), (next_row, by_row))
                    _fetch_rows(emit, begin, by_row, height, -(-VECTORS * BYTES // LINE), True)
            _add_up(emit, sums, a, b, own, first, ahead if fetches else None)
            _put(emit, sums, c, own, first, add)
            return context.get_dummy_value()

        return types.void(c, a, b, ahead, panel, first, add, apart), code

    return tile


def _add_up(emit, sums, a, b, panels, first, ahead):
    """Add the products of rows of a with panels of b to ``sums``, vectors by row."""
    builder = emit.builder
    by_tile, by_row, by_repeat, by_step = emit.strides(a)
    b_panel, b_row, _ = emit.strides(b)
    *_, repeats, steps = cgutils.unpack_tuple(builder, a.shape)
    tall = emit.integer(TALL)
    places = [builder.add(first, emit.integer(i)) for i in range(len(sums))]
    tiles = [(builder.udiv(place, tall), builder.urem(place, tall)) for place in places]
    a_rows = [emit.apart(emit.moved(a.data, (t, by_tile), (i, by_row))) for t, i in tiles]
    b_begins = [emit.moved(b.data, (panel, b_panel)) for panel in panels]
    with cgutils.for_range(builder, repeats) as outer:
        parts = [(emit.moved(row, (outer.index, by_repeat)), by_step) for row in a_rows]
        before = builder.mul(outer.index, steps)
        b_parts = [(emit.moved(begin, (before, b_row)), b_row) for begin in b_begins]
        if ahead is None:
            with emit.steps(emit.integer(0), steps, emit.integer(1)) as step:
                _add_step(emit, sums, parts, b_parts, step)
            return
        by_row_ahead, by_repeat_ahead, by_column = emit.strides(ahead)
        some = emit.integer(LINE // emit.align)  # steps, whose numbers share a line
        with emit.steps(emit.integer(0), steps, some) as start:
            places = (first, by_row_ahead), (outer.index, by_repeat_ahead), (start, by_column)
            _fetch_rows(emit, emit.moved(ahead.data, *places), by_row_ahead, len(sums))
            end = builder.add(start, some)
            end = builder.select(builder.icmp_signed("<", end, steps), end, steps)
            with emit.steps(start, end, emit.integer(1)) as step:
                _add_step(emit, sums, parts, b_parts, step)


def _add_step(emit, sums, a_rows, b_panels, step):
    """One number of each row of a times a row of each panel of b."""
    builder, vector = emit.builder, sums[0][0].type.pointee
    b_rows = [emit.moved(panel, (step, stride)) for panel, stride in b_panels]
    b_vectors = [
        emit.load(emit.moved(row, (emit.integer(BYTES), emit.integer(v))), vector)
        for row in b_rows
        for v in range(VECTORS)
    ]
    for (row, stride), own in zip(a_rows, sums, strict=True):
        number = emit.load(emit.moved(row, (step, stride)), emit.real)
        same = emit.broadcast(number, vector.count)
        for total, other in zip(own, b_vectors, strict=True):
            builder.store(emit.add_product(same, other, builder.load(total)), total)


def _fetch_rows(emit, begin, by_row, count, lines=1, write=False):
    """Fetch ``lines`` of memory from ``begin`` on, and of the rows after it."""
    for i in range(count):
        for place in range(lines):
            moved = (emit.integer(i), by_row), (emit.integer(place), emit.integer(LINE))
            emit.fetch(emit.moved(begin, *moved), write)


def _put(emit, sums, c, panels, first, add):
    """Write ``sums`` to panels of c, or add them."""
    builder, vector = emit.builder, sums[0][0].type.pointee
    by_panel, by_row, _ = emit.strides(c)
    begins = [emit.moved(c.data, (panel, by_panel), (first, by_row)) for panel in panels]
    for i, own in enumerate(sums):
        for v, total in enumerate(own):
            begin, place = begins[v // VECTORS], emit.integer(v % VECTORS)
            at = emit.moved(begin, (emit.integer(i), by_row), (emit.integer(BYTES), place))
            with builder.if_then(add):
                before = emit.load(at, vector)
                builder.store(builder.fadd(before, builder.load(total)), total)
            emit.store(builder.load(total), at)


@intrinsic
def _fetch_one(typing, x, i):
    """Begin to fetch x[i] of x [n], with the rest of its line."""

    def code(context, builder, signature, arguments):
        emit = _Code(context, builder, signature.args[0].dtype)
        array = emit.array(signature.args[0], arguments[0])
        emit.fetch(emit.moved(array.data, (arguments[1], emit.strides(array)[0])))
        return context.get_dummy_value()

    return types.void(x, i), code


@intrinsic
def _copy_tall(typing, out, x):
    """`TALL` numbers of x [n] to out [n]."""

    def code(context, builder, signature, arguments):
        emit = _Code(context, builder, signature.args[0].dtype)
        arrays = zip(signature.args, arguments, strict=True)
        out, x = (emit.array(kind, value) for kind, value in arrays)
        emit.store(emit.load(x.data, emit.vector(TALL)), out.data)
        return context.get_dummy_value()

    return types.void(out, x), code


@intrinsic
def _transpose_square(typing, out, x, i, j):
    """One square of out = xᵀ: out[j + b, i + a] = x[i + a, j + b] for a, b < `SQUARE`; rows have no
    gaps."""

    def code(context, builder, signature, arguments):
        emit = _Code(context, builder, signature.args[0].dtype)
        arrays = zip(signature.args[:2], arguments[:2], strict=True)
        out, x = (emit.array(kind, value) for kind, value in arrays)
        i, j = arguments[2:]

        def places(array, row, column):
            down, across = emit.strides(array)
            begin = emit.moved(array.data, (row, down), (column, across))
            return [emit.moved(begin, (emit.integer(k), down)) for k in range(SQUARE)]

        rows = [emit.load(place, emit.vector(SQUARE)) for place in places(x, i, j)]
        half, lanes = SQUARE // 2, ir.VectorType(ir.IntType(32), SQUARE)
        turns = [
            ir.Constant(lanes, [begin + k // 2 + k % 2 * SQUARE for k in range(SQUARE)])
            for begin in (0, half)
        ]
        for _ in range(half.bit_length()):  # two rows take turns: after log₂ times they are columns
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [builder.shuffle_vector(*pair, turn) for pair in pairs for turn in turns]
        for row, place in zip(rows, places(out, j, i), strict=True):
            emit.store(row, place)
        return context.get_dummy_value()

    return types.void(out, x, i, j), code


def _checked_tile(height, panels=1, fetches=False):
    """As `_tile`, but for rounding and what is fetched, in loops whose indices are checked."""

    @njit(**EXACT)
    def tile(c, a, b, ahead, panel, first, add, apart):
        steps = a.shape[3]
        for own in range(panel, panel + panels):
            for i in range(first, first + height):
                for lane in range(c.shape[2]):
                    total = c.dtype.type(0)
                    for k in range(b.shape[1]):
                        factor = a[i // TALL, i % TALL, k // steps, k % steps]
                        total += factor * b[own, k, lane]
                    c[own, i, lane] = c[own, i, lane] + total if add else total

    return tile


if CHECKED or config.DISABLE_JIT:
    _make = _checked_tile

    @njit(**EXACT)
    def _fetch_number(x, i):
        pass

    @njit(**EXACT)
    def _copy(out, x):
        for i in range(TALL):
            out[i] = x[i]

    @njit(**EXACT)
    def _square(out, x, i, j):
        for row in range(i, i + SQUARE):
            for column in range(j, j + SQUARE):
                out[column, row] = x[row, column]

else:
    _make = _tile
    _copy, _square = _copy_tall, _transpose_square
    _fetch_number = _fetch_one

_tall, _single = _make(TALL), _make(1)
_tall_and_ahead = _make(TALL, fetches=True)
_long, _double = _make(LONG, 2), _make(2, 2)
_long_and_ahead = _make(LONG, 2, fetches=True)
_single_of_two = _make(1, 2)


@njit(**EXACT)
def fetch(x):
    """Begin to fetch x [n]."""
    for i in range(0, x.size, LINE // x.itemsize):
        _fetch_number(x, i)


@njit(**EXACT)
def empty_panels(count, rows, like):
    """Panels [count, rows, WIDTH] whose rows begin where a line of the cache does: a vector that
    lies in two is read twice."""
    width = width_of(like)
    size = count * rows * width
    numbers = np.empty(size + LINE // like.itemsize, like.dtype)
    first = -numbers.ctypes.data % LINE // like.itemsize
    return numbers[first : first + size].reshape(count, rows, width)


@njit(**EXACT)
def multiply(c, a, b, add):
    """c [P, M, WIDTH] = a [M, R, K / R] by b [P, K, WIDTH], added to c if ``add``. All may be
    views, but a row of a panel has no gaps."""
    _multiply(c, a, b, add, a[:0])


@njit(**EXACT)
def multiply_far(c, a, b, add):
    """The same where a is not in the cache yet: while the first panel is multiplied by a tile's
    rows, those of the next are fetched."""
    _multiply(c, a, b, add, a[TALL:])


@njit(**EXACT)
def _multiply(c, a, b, add, ahead):
    rows, repeats, steps = a.shape
    if c.shape[0] != b.shape[0] or c.shape[1] != rows or b.shape[1] != repeats * steps:
        raise ValueError("shapes do not agree")
    if a.size == 0 and not add:
        c[:] = 0
    together = max(1, DEEP // max(1, steps))
    for i in range(0, rows, SLAB):
        for r in range(0, repeats, together):
            for k in range(0, steps, DEEP):
                a_block = a[i : i + SLAB, r : r + together, k : k + DEEP]
                begin = r * steps + k
                b_block = b[:, begin : begin + a_block.shape[1] * a_block.shape[2]]
                # the last tile may reach past a; no row beyond M is read
                shape = (-(-a_block.shape[0] // TALL), TALL, *a_block.shape[1:])
                tiles = as_strided(a_block, shape, (TALL * a_block.strides[0], *a_block.strides))
                own, more = c[:, i : i + SLAB], add or begin > 0
                _block(own, tiles, b_block, more, ahead[i:, r:, k:])


@njit(**EXACT)
def _block(c, a, b, add, ahead):
    """`multiply` of matrices that stay in the cache; a is [tiles, TALL, R, K / R]. Meanwhile
    ``ahead`` [n, R, m] is fetched, a tile's rows of it per tile of the first panel; and if c's rows
    lie apart, those that are written next."""
    panels, rows, width = c.shape
    apart = c.strides[1] > width * c.itemsize
    pairs = panels - panels % 2 if LONG > 1 else 0
    for panel in range(0, pairs, 2):
        _pair(c, a, b, ahead, panel, add, apart)
    tall = rows - rows % TALL
    for panel in range(pairs, panels):
        for first in range(0, tall, TALL):
            if panel == 0 and ahead.size > 0:
                _tall_and_ahead(c, a, b, ahead, panel, first, add, False)
            else:
                _tall(c, a, b, ahead, panel, first, add, apart)
        for first in range(tall, rows):
            _single(c, a, b, ahead, panel, first, add, False)


@njit(**EXACT)
def _pair(c, a, b, ahead, panel, add, apart):
    """Two panels of `_block`."""
    rows = c.shape[1]
    long, even = rows - rows % LONG, rows - rows % 2
    for first in range(0, long, LONG):
        if panel == 0 and ahead.size > 0:
            _long_and_ahead(c, a, b, ahead, panel, first, add, False)
        else:
            _long(c, a, b, ahead, panel, first, add, apart)
    for first in range(long, even, 2):
        _double(c, a, b, ahead, panel, first, add, False)
    for first in range(even, rows):
        _single_of_two(c, a, b, ahead, panel, first, add, False)


@njit(**EXACT)
def empty_tiles(rows, steps, like):
    """Room for the transpose of w [steps, rows], as `multiply_tiles` reads it."""
    return np.empty((-(-rows // TALL), steps + GAP, TALL), like.dtype)


@njit(**EXACT)
def put_tiles(tiles, w, first, steps, start, rows):
    """Fill ``tiles`` from w [K, M]: ``steps`` rows and ``rows`` columns from w[first, start] on."""
    for k in range(steps):
        row = w[first + k, start : start + rows]
        for tile in range(rows // TALL):
            _copy(tiles[tile, k], row[tile * TALL :])
        for i in range(rows - rows % TALL, rows):
            tiles[i // TALL, k, i % TALL] = row[i]


@njit(**EXACT)
def multiply_tiles(c, tiles, b, add):
    """c [P, M, WIDTH] = wᵀ b of w [K, M], in tiles, and b [P, K, WIDTH]; added to c if ``add``."""
    for k in range(0, b.shape[1], DEEP):
        some = b[:, k : k + DEEP]
        _block(c, by_rows(tiles[:, k:], some.shape[1]), some, add or k > 0, b[:0])


@njit(**EXACT)
def by_rows(tiles, steps):
    """The first ``steps`` rows of w, in tiles, as a of `_block`."""
    by_tile, by_step, by_row = tiles.strides
    shape = (tiles.shape[0], TALL, 1, steps)
    return as_strided(tiles, shape, (by_tile, by_row, 0, by_step))


def turned_shape(steps, rows):
    """The shape of w [steps, rows] as `put_turned` writes it: blocks, each in tiles."""
    blocks = -(-rows // SLAB) * -(-steps // DEEP)
    return blocks, -(-min(rows, SLAB) // TALL), min(steps, DEEP) + GAP, TALL


@njit(**EXACT)
def put_turned(blocks, w, part, parts):
    """Write a part of the blocks of w [K, M] in the order in which `multiply_transposed` reads
    them."""
    steps, rows = w.shape
    across = -(-steps // DEEP)
    for n in range(blocks.shape[0] * part // parts, blocks.shape[0] * (part + 1) // parts):
        i, k = n // across * SLAB, n % across * DEEP
        put_tiles(blocks[n], w, k, min(DEEP, steps - k), i, min(SLAB, rows - i))


@njit(**EXACT)
def multiply_transposed(c, w, turned, b, add, following):
    """c [P, M, WIDTH] = wᵀ b of w [K, M] and b [P, K, WIDTH], added to c if ``add``. ``turned``
    are w's blocks (`put_turned`), or none. ``following`` [n, m] is the weight that is wanted next,
    or has no rows.

    A tile would read a few numbers of each row of w, and fetch a line of memory for them. So what
    stays in the cache is copied there first, in the order in which tiles read it; what is copied
    next is fetched meanwhile.
    """
    steps, rows = w.shape
    if c.shape[0] != b.shape[0] or c.shape[1] != rows or b.shape[1] != steps:
        raise ValueError("shapes do not agree")
    if w.size == 0 and not add:
        c[:] = 0
    across = max(1, -(-steps // DEEP))
    for n in range(turned.shape[0]):
        i, k = n // across * SLAB, n % across * DEEP
        some = b[:, k : k + DEEP]
        tiles = by_rows(turned[n], some.shape[1])
        _block(c[:, i : i + SLAB], tiles, some, add or k > 0, factor(w[:0]))
    for i in range(0, rows if turned.shape[0] == 0 else 0, SLAB):
        ahead = following
        if i + SLAB < rows:
            ahead = w[:, i + SLAB :]
        multiply_slab(c[:, i : i + SLAB], w, i, b, add, ahead)


@njit(**EXACT)
def multiply_slab(c, w, first, b, add, following):
    """Rows of `multiply_transposed` from ``first`` on, as many as c [P, M, WIDTH] has: `SLAB` at
    most."""
    steps, rows = w.shape[0], c.shape[1]
    tiles = empty_tiles(rows, min(steps, DEEP), w)
    for k in range(0, steps, DEEP):
        some, ahead = b[:, k : k + DEEP], following
        put_tiles(tiles, w, k, some.shape[1], first, rows)
        if k + DEEP < steps:
            ahead = w[k + DEEP :, first:]
        _block(c, by_rows(tiles, some.shape[1]), some, add or k > 0, factor(ahead))


@njit(**EXACT)
def factor(w):
    """w [M, K] as `multiply` wants a."""
    return as_strided(w, (w.shape[0], 1, w.shape[1]), (w.strides[0], 0, w.strides[1]))


@njit(**EXACT)
def turned(x):
    """x [P, M, n] as [M, P, n], a view. (NumPy's `transpose` takes Numba three seconds.)"""
    p, m, n = x.shape
    return as_strided(x, (m, p, n), (x.strides[1], x.strides[0], x.strides[2]))


@njit(**EXACT)
def pack(panel, x):
    """A panel [K, WIDTH] whose columns are the rows of x [n, K]; zeros beyond."""
    count = x.shape[0]
    _transpose(panel, x)
    if count < panel.shape[1]:
        for k in range(panel.shape[0]):
            panel[k, count:] = 0


@njit(**EXACT)
def _transpose(out, x):
    """out [n, m] = xᵀ of x [m, n]; out may be larger."""
    m, n = x.shape
    whole_m, whole_n = m - m % SQUARE, n - n % SQUARE
    for j in range(0, whole_n, SQUARE):
        for i in range(0, whole_m, SQUARE):
            _square(out, x, i, j)
    for i in range(m):
        for j in range(whole_n if i < whole_m else 0, n):
            out[j, i] = x[i, j]


@njit(**EXACT)
def pack_rows(panels, x, order, per_token):
    """panels [P, K, WIDTH]: column r is row order[r] // per_token of x [rows, K]; zeros beyond."""
    width = panels.shape[2]
    rows = np.empty((width, x.shape[1]), x.dtype)
    for panel in range(panels.shape[0]):
        first = panel * width
        count = min(width, order.size - first)
        for i in range(count):
            if first + i + SOON < order.size:
                fetch(x[order[first + i + SOON] // per_token])
            row, out = x[order[first + i] // per_token], rows[i]
            for k in range(row.size):
                out[k] = row[k]
        pack(panels[panel], rows[:count])


@njit(**EXACT)
def unpack_rows(x, panels):
    """x [rows, K] from panels [P, K, WIDTH], whose columns are its rows."""
    width = panels.shape[2]
    for panel in range(panels.shape[0]):
        rows = x[panel * width : (panel + 1) * width]
        _transpose(rows, panels[panel, :, : rows.shape[0]])


@njit(**EXACT)
def _whole_panels(x, start, count):
    """So many panels of the columns of x [n, m] from ``start`` on, a view."""
    width = width_of(x)
    strides = (width * x.itemsize, x.strides[0], x.itemsize)
    return as_strided(x[:, start:], (count, x.shape[0], width), strides)


@njit(**EXACT)
def _put_columns(panel, x, first):
    """The columns of x [n, m] from ``first`` on, to a panel [n, WIDTH] that they do not fill."""
    for i in range(x.shape[0]):
        for lane in range(x.shape[1] - first):
            panel[i, lane] = x[i, first + lane]


@njit(**EXACT)
def _take_columns(x, first, panel):
    """The reverse of `_put_columns`."""
    for i in range(x.shape[0]):
        for lane in range(x.shape[1] - first):
            x[i, first + lane] = panel[i, lane]


@njit(**EXACT)
def multiply_rows(c, a, b, add):
    """c [M, N] = a [M, K] b [K, N], none of them in panels, added to c if ``add``: for factors that
    are used once, or by rows. All may be views, but a row of c has no gaps, and of b no row or no
    column has."""
    (rows, columns), steps = c.shape, a.shape[1]
    width = width_of(c)
    if a.shape[0] != rows or b.shape[0] != steps or b.shape[1] != columns:
        raise ValueError("shapes do not agree")
    if steps == 0 and not add:
        c[:] = 0
    if rows <= FEW:
        _multiply_few(c, a, b, add)
        return
    packed = empty_panels(PANELS, min(steps, DEEP), c)
    edge = empty_panels(1, rows, c)[:, :rows]  # a view, as whole panels are
    for k in range(0, steps, DEEP):
        a_block = factor(a[:, k : k + DEEP])
        deep, more = a_block.shape[2], add or k > 0
        for start in range(0, columns, PANELS * width):
            stop = min(start + PANELS * width, columns)
            whole = (stop - start) // width
            _pack_block(packed, b[k : k + deep, start:stop])
            multiply(_whole_panels(c, start, whole), a_block, packed[:whole, :deep], more)
            if start + whole * width < stop:
                _put_columns(edge[0], c[:, :stop], start + whole * width)
                multiply(edge, a_block, packed[whole : whole + 1, :deep], more)
                _take_columns(c[:, :stop], start + whole * width, edge[0])


@njit(fastmath={"reassoc"}, boundscheck=CHECKED)
def _multiply_few(c, a, b, add):
    """`multiply_rows`, a row at a time; where b is wᵀ, sums are in vector lanes."""
    steps, columns = b.shape
    own, out = np.empty(steps, c.dtype), np.empty(columns, c.dtype)  # without gaps
    by_row, by_column = b, b.T
    for i in range(c.shape[0]):
        for k in range(steps):
            own[k] = a[i, k]
        if b.strides[1] != b.itemsize:
            for j in range(columns):
                row, total = by_column[j], c.dtype.type(0)
                for k in range(steps):
                    total += own[k] * row[k]
                out[j] = total
        else:
            out[:] = 0
            for k in range(steps):
                row = by_row[k]
                for j in range(columns):
                    out[j] += own[k] * row[j]
        for j in range(columns):
            c[i, j] = c[i, j] + out[j] if add else out[j]


@njit(**EXACT)
def _pack_block(panels, x):
    """panels [P, …, WIDTH]: the columns of x [n, m]; zeros in what the last does not fill."""
    width, (rows, columns) = panels.shape[2], x.shape
    if x.strides[1] != x.itemsize:
        by_column = as_strided(x, (columns, rows), (x.strides[1], x.strides[0]))
        for first in range(0, columns, width):
            pack(panels[first // width, :rows], by_column[first : first + width])
        return
    for i in range(rows):
        put_row(panels, i, x[i])


@njit(**EXACT)
def put_row(panels, i, row):
    """Row i of panels [P, …, WIDTH]: the numbers of row [n]; zeros in what the last does not
    fill."""
    width = width_of(panels)
    whole = row.size // width
    for panel in range(whole):
        out, part = panels[panel, i], row[panel * width :]
        for lane in range(width):
            out[lane] = part[lane]
    if whole * width < row.size:
        out, part = panels[whole, i], row[whole * width :]
        out[part.size :] = 0
        for lane in range(part.size):
            out[lane] = part[lane]


@njit(**EXACT)
def pack_columns(panels, x, order, per_token, first, stop):
    """Of panels [P, rows, WIDTH] the rows first … stop: the columns of x [M, N], of its rows
    order // per_token; zeros in what the last panel does not fill."""
    for r in range(first, stop):
        if r + SOON < stop:
            fetch(x[order[r + SOON] // per_token])
        put_row(panels, r, x[order[r] // per_token])


@njit(**EXACT)
def outer_products(dw, a, b, add):
    """dw [M, N] = Σ_r a_r b_rᵀ, added to dw if ``add``, where a_r is column r of a, panels
    [P, M, WIDTH], and b_r row r of b, panels [⌈N / WIDTH⌉, rows, WIDTH]."""
    width, whole = b.shape[2], dw.shape[1] // b.shape[2]
    edge = empty_panels(1, dw.shape[0], dw)[:, : dw.shape[0]]  # a view, as whole panels are
    filled = whole == b.shape[0]  # else the last panel goes by way of edge
    if b.shape[1] == 0:
        if not add:
            dw[:] = 0
        return
    if add and not filled:
        _put_columns(edge[0], dw, whole * width)
    for begin in range(0, b.shape[1], DEEP):
        rows, columns = b[:, begin : begin + DEEP], turned(a)[:, begin // width :]
        more = add or begin > 0
        for panel in range(0, whole, PANELS):
            some = rows[panel : min(panel + PANELS, whole)]
            direct = _whole_panels(dw, panel * width, some.shape[0])
            _multiply_columns(direct, columns, some, more, panel == 0)
        if not filled:
            _multiply_columns(edge, columns, rows[whole:], more, whole == 0)
    if not filled:
        _take_columns(dw, whole * width, edge[0])


@njit(**EXACT)
def _multiply_columns(c, a, b, add, far):
    """c = Σ_k a_k b_kᵀ over the rows b_k of b [P, K, WIDTH], where a_k is column k of a
    [M, panels, WIDTH], which is ``far``, or in the cache; added to c if ``add``. K need not fill
    the last panel."""
    width, steps = a.shape[2], b.shape[1]
    whole = steps // width
    full, ahead = a[:, :whole], a[TALL if far else a.shape[0] :]
    _multiply(c, full, b[:, : whole * width], add, ahead)
    if whole * width < steps:
        rest = a[:, whole : whole + 1, : steps - whole * width]
        multiply(c, rest, b[:, whole * width :], add or whole > 0)
