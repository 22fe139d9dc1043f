"""Memory that checks every access: bounds, alignment, bytes never written, races, read-only data.

An `Arena` is one address space: `copies` of one layout (a block's shared memory, a thread's local memory), or one copy
(global, param). Data that no thread may touch lies between the variables. Two accesses to the same bytes by different
threads, at least one a write and not both atomic, are a race unless ordered: by program order, by a barrier of the
block, or by bar.warp.sync within a warp. Same-value writes are allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .parse import UNSIGNED

Array = np.ndarray
GUARD, MOST_GUARD = 256, 1 << 20  # bytes before the first variable and after each: as many as it has, within these
SHARED_WINDOW, LOCAL_WINDOW, GLOBAL_START, WINDOW = 1 << 40, 1 << 41, 1 << 44, 1 << 32


class Arena:
    """`fail(i, message)` is called with the number of the first lane of an access that is wrong."""

    def __init__(self, name: str, base: int, granule: int) -> None:
        self.name, self.base, self.granule = name, base, granule
        self.names: list[str] = ["no variable"]
        self.places: list[tuple[int, int, bool]] = [(0, 0, False)]  # offset, size, read-only
        self.offsets: dict[str, int] = {}
        self.size = GUARD

    def add(self, name: str, size: int, align: int = 256, read_only: bool = False) -> int:
        """Lay out a variable, in shared and local memory at no better alignment than its own; its address."""
        start = -(-self.size // align) * align
        start += align if self.name in ("shared", "local") and start % (2 * align) == 0 else 0
        self.names.append(name)
        self.places.append((start, size, read_only))
        self.offsets[name] = start
        self.size = start + size + min(max(size, GUARD), MOST_GUARD)
        return self.base + start

    def allocate(self, copies: int, tracked: bool = True) -> None:
        """All bytes poisoned (0xFF: NaN in every float type) and unwritten; `tracked`: who did what is kept."""
        self.stride = -(-self.size // 256) * 256
        self.copies = copies
        self.bytes = np.full(copies * self.stride, 0xFF, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.owner = np.zeros(self.stride, np.int16)
        for number, (start, size, _) in enumerate(self.places):
            self.owner[start : start + size] = number
        self.read_only = np.array([place[2] for place in self.places])
        granules = copies * self.stride // self.granule
        self.valid = np.zeros(granules, bool)
        granules = granules if tracked else 0
        self.writer = np.full(granules, -1, np.int64)
        self.written = np.zeros(granules, np.int64)
        self.atomic = np.zeros(granules, bool)
        self.reader = np.full(granules, -1, np.int64)
        self.read = np.zeros(granules, np.int64)
        self.readers = np.zeros(granules, np.int8)  # 0 one warp, 1 several warps, 2 several blocks
        self.constant = np.zeros(granules, bool)  # read by ld.global.nc

    def reset(self) -> None:
        self.bytes.fill(0xFF)
        self.valid.fill(False)
        self.writer.fill(-1)
        self.reader.fill(-1)
        self.readers.fill(0)

    def put(self, name: str, data: bytes | Array, valid: bool = True) -> None:
        for start in self.offsets[name] + self.stride * np.arange(self.copies):
            self.bytes[start : start + len(data)] = np.frombuffer(data, np.uint8)
            self.valid[start // self.granule : -(-(start + len(data)) // self.granule)] = valid

    def locate(self, address: Array, copy: Array, size: int, write: bool, fail: Callable) -> Array:
        """Positions in `bytes` of an access of `size` bytes a lane, after the checks of alignment and bounds."""
        offset = (address - np.uint64(self.base)).astype(np.int64)
        if (wrong := offset & (size - 1) != 0).any():
            fail(wrong, lambda i: f"{size}-byte access to {self.where(address[i])} is misaligned")
        inside = (offset >= 0) & (offset <= self.stride - size)
        safe = offset if inside.all() else np.where(inside, offset, 0)
        owner = self.owner[safe]
        if (wrong := (owner == 0) | (owner != self.owner[safe + (size - 1)])).any():
            fail(wrong, lambda i: f"{size}-byte access out of bounds: {self.where(address[i])}")
        if write and (wrong := self.read_only[owner]).any():
            fail(wrong, lambda i: f"write to read-only memory: {self.where(address[i])}")
        return offset + copy * self.stride

    def where(self, address: int) -> str:
        """The address in words: inside or near which variable."""
        offset = int(address) - self.base
        near = [(max(s - offset, offset - s - n + 1, 0), i) for i, (s, n, _) in enumerate(self.places) if i]
        if not near or min(near)[0] > 1 << 20:
            return f"{self.name} address {int(address):#x}, near no variable"
        distance, i = min(near)
        start, size, _ = self.places[i]
        at = f"byte {offset - start} of {self.names[i].split('@')[0]}, which has {size} bytes"
        return f"{self.name} {at}" + (f" ({distance} outside)" if distance else "")

    def spread(self, position: Array, size: int) -> Array:
        """Granules of each access, [lanes, size / granule]."""
        count = max(size // self.granule, 1)
        return (
            (position // self.granule)[:, None] + np.arange(count) if count > 1 else position[:, None] // self.granule
        )


class Order:
    """What is ordered before what: the time of each block's last barrier and of each warp's last bar.warp.sync."""

    def __init__(self, blocks: int, warps: int) -> None:
        self.warps, self.now = warps, 1  # warps a block; a thread's number is ((block · warps) + warp) · 32 + lane
        self.block_time = np.zeros(blocks, np.int64)
        self.warp_time = np.zeros(blocks * warps, np.int64)

    def racing(self, other: Array, time: Array, thread: Array) -> Array:
        """Accesses by `other` at `time` that are not ordered before what `thread` does now (−1: nobody)."""
        racing = (other != thread) & (other >= 0)
        if racing.any():
            warp = thread >> 5
            block = warp // self.warps
            same_block = (other >> 5) // self.warps == block
            racing &= ~(same_block & (time < self.block_time[block]))
            racing &= ~((other >> 5 == warp) & (time < self.warp_time[warp]))
        return racing


def check_read(
    arena: Arena, order: Order, position: Array, size: int, thread: Array, fail: Callable, races: bool, constant: bool
) -> None:
    """A plain read: of written bytes, not racing with a write, and of what nobody writes if it is a .nc load."""
    granules = arena.spread(position, size)
    if not arena.valid[granules].all():
        wrong = ~arena.valid[granules].all(1)
        message = "bytes that were never written (or are still in flight by cp.async)"
        fail(wrong, lambda i: f"reads {message} at {arena.where(position[i] % arena.stride + arena.base)}")
    if constant:
        if (wrong := (arena.writer[granules] >= 0).any(1)).any():
            fail(wrong, lambda i: "ld.global.nc of memory that this kernel writes")
        arena.constant[granules] = True
    if not races:
        return
    thread = thread[:, None]
    writer = arena.writer[granules]
    if (racing := order.racing(writer, arena.written[granules], thread)).any():
        fail(racing.any(1), lambda i: race(arena, "reads", position[i], order, writer[i], racing[i], "wrote"))
    before, warp = arena.reader[granules], thread >> 5
    fresh = ~order.racing(before, arena.read[granules], thread)
    block = warp // order.warps
    many = np.where((before >> 5) // order.warps != block, 2, (before >> 5 != warp).astype(np.int8)).astype(np.int8)
    many = np.where(fresh, 0, np.maximum(many, arena.readers[granules]))
    arena.readers[granules] = np.where(arena.readers[granules] == 2, 2, many)
    arena.reader[granules] = thread
    arena.read[granules] = order.now
    last = arena.reader[granules] >> 5
    if (last != warp).any():
        others = np.where(last // order.warps != block, 2, 1).astype(np.int8)
        np.maximum.at(arena.readers, granules[last != warp], others[last != warp])


def check_write(
    arena: Arena, order: Order, position: Array, size: int, thread: Array, fail: Callable, races: bool, same: Array
) -> None:
    """A plain write or the start of an asynchronous one; `same` marks lanes that leave the bytes as they are."""
    granules = arena.spread(position, size)
    thread = thread[:, None]
    if (wrong := arena.constant[granules].any(1)).any():
        fail(wrong, lambda i: "writes memory that this kernel reads by ld.global.nc")
    if races:
        writer = arena.writer[granules]
        racing = order.racing(writer, arena.written[granules], thread) & ~same[:, None]
        if racing.any():
            fail(racing.any(1), lambda i: race(arena, "writes", position[i], order, writer[i], racing[i], "wrote"))
        reader = arena.reader[granules]
        racing = order.racing(reader, arena.read[granules], thread)
        if (several := arena.readers[granules] > 0).any():
            block = (thread >> 5) // order.warps
            ordered = ((reader >> 5) // order.warps == block) & (arena.read[granules] < order.block_time[block])
            racing |= several & ~(ordered & (arena.readers[granules] == 1))
        if (racing & ~same[:, None]).any():
            wrong = (racing & ~same[:, None]).any(1)
            fail(wrong, lambda i: race(arena, "writes", position[i], order, reader[i], racing[i], "read"))
    arena.writer[granules] = thread
    arena.written[granules] = order.now
    arena.atomic[granules] = False


def check_atomic(
    arena: Arena, order: Order, position: Array, size: int, thread: Array, fail: Callable, races: bool
) -> None:
    granules = arena.spread(position, size)
    thread = thread[:, None]
    if not arena.valid[granules].all():
        fail(~arena.valid[granules].all(1), lambda i: "atomic on bytes that were never written")
    if (wrong := arena.constant[granules].any(1)).any():
        fail(wrong, lambda i: "writes memory that this kernel reads by ld.global.nc")
    if races:
        writer, reader = arena.writer[granules], arena.reader[granules]
        for other, time, what in ((writer, arena.written, "wrote"), (reader, arena.read, "read")):
            racing = order.racing(other, time[granules], thread)
            racing &= ~arena.atomic[granules] if what == "wrote" else True
            if racing.any():
                fail(
                    racing.any(1),
                    lambda i, o=other, r=racing, w=what: race(arena, "updates", position[i], order, o[i], r[i], w),
                )
    arena.writer[granules] = thread
    arena.written[granules] = order.now
    arena.atomic[granules] = True


def race(arena: Arena, verb: str, position: int, order: Order, other: Array, racing: Array, did: str) -> str:
    thread = int(other[np.flatnonzero(racing)[0]] if racing.any() else other[0])
    block, warp = divmod(thread >> 5, order.warps)
    where = arena.where(int(position) % arena.stride + arena.base)
    return (
        f"race: {verb} {where}, which lane {thread & 31} of warp {warp} of block {block} {did} with no barrier between"
    )


def rounds(position: Array, rng: np.random.Generator) -> Iterable[Array]:
    """Indices of lanes in a random order, so grouped that no address comes twice in a group."""
    shuffled = rng.permutation(len(position))
    by_address = shuffled[np.argsort(position[shuffled], kind="stable")]
    sorted_position = position[by_address]
    start = np.flatnonzero(np.r_[True, sorted_position[1:] != sorted_position[:-1]])
    rank = np.arange(len(position)) - np.repeat(start, np.diff(np.r_[start, len(position)]))
    for number in range(int(rank.max()) + 1):
        yield by_address[rank == number]
