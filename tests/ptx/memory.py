"""Memory that checks every access: bounds, alignment, bytes never written, races, read-only data.

An `Arena` is one address space: `copies` of one layout (a block's shared memory), or one (global, param). Data that no
thread may touch lies between the variables. Two accesses to the same bytes by different threads, at least one a write
and not both atomic, are a race unless ordered: by program order, by a barrier of the block, or by bar.warp.sync within
a warp. Same-value writes are allowed. A check calls `fail(wrong, message)` with the lanes whose access is wrong and
the words for lane number i; positions are those in `bytes`, size is of one lane's access in bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .parse import UNSIGNED

Array = np.ndarray
Fail = Callable[[Array, Callable[[int], str]], None]
GUARD, MOST_GUARD = 256, 1 << 20  # bytes before the first variable and after each: as many as it has, within these


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


class Arena:
    """granule: the bytes that are tracked together. order: None if accesses need no check but of bounds."""

    def __init__(self, name: str, base: int, granule: int, order: Order | None = None, races: bool = False) -> None:
        self.name, self.base, self.granule, self.order, self.races = name, base, granule, order, races
        self.names: list[str] = ["no variable"]
        self.places: list[tuple[int, int, bool]] = [(0, 0, False)]  # offset, size, read-only
        self.size = GUARD

    def add(self, name: str, size: int, align: int = 256, read_only: bool = False) -> int:
        """Lay out a variable, in shared memory at no better alignment than its own; its address."""
        start = -(-self.size // align) * align
        start += align if self.name == "shared" and start % (2 * align) == 0 else 0
        self.names.append(name)
        self.places.append((start, size, read_only))
        self.size = start + size + min(max(size, GUARD), MOST_GUARD)
        return self.base + start

    def allocate(self, copies: int) -> None:
        """All bytes poisoned (0xFF: NaN in every float type) and unwritten."""
        self.stride = -(-self.size // 256) * 256
        self.bytes = np.empty(copies * self.stride, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.owner = np.zeros(self.stride, np.int16)
        for number, (start, size, _) in enumerate(self.places):
            self.owner[start : start + size] = number
        self.read_only = np.array([place[2] for place in self.places])
        granules = copies * self.stride // self.granule
        self.valid, self.atomic, self.constant = (np.zeros(granules, bool) for _ in range(3))  # constant: read by .nc
        self.writer, self.written, self.reader, self.read = (np.zeros(granules, np.int64) for _ in range(4))
        self.readers = np.zeros(granules, np.int8)  # 0 one warp, 1 several warps, 2 several blocks
        self.reset()

    def reset(self) -> None:
        self.bytes.fill(0xFF)
        self.valid.fill(False)
        self.writer.fill(-1)
        self.reader.fill(-1)
        self.readers.fill(0)

    def put(self, address: int, data: Array, valid: bool = True) -> None:
        start = address - self.base
        self.bytes[start : start + len(data)] = data
        self.valid[start // self.granule : -(-(start + len(data)) // self.granule)] = valid

    def locate(self, address: Array, copy: Array | int, size: int, write: bool, fail: Fail) -> Array:
        """Positions of an access, after the checks of alignment and bounds."""
        offset = (address - np.uint64(self.base)).astype(np.int64)
        if (wrong := offset & (size - 1) != 0).any():
            fail(wrong, lambda i: f"{size}-byte access to {self.where(offset[i])} is misaligned")
        inside = (offset >= 0) & (offset <= self.stride - size)
        safe = offset if inside.all() else np.where(inside, offset, 0)
        owner = self.owner[safe]
        if (wrong := (owner == 0) | (owner != self.owner[safe + (size - 1)])).any():
            fail(wrong, lambda i: f"{size}-byte access out of bounds: {self.where(offset[i])}")
        if write and (wrong := self.read_only[owner]).any():
            fail(wrong, lambda i: f"write to read-only memory: {self.where(offset[i])}")
        return offset + copy * self.stride

    def where(self, offset: int) -> str:
        """In words: inside or near which variable."""
        near = [(max(s - offset, offset - s - n + 1, 0), i) for i, (s, n, _) in enumerate(self.places) if i]
        if not near or min(near)[0] > 1 << 20:
            return f"{self.name} address {self.base + int(offset):#x}, near no variable"
        distance, i = min(near)
        start, size, _ = self.places[i]
        at = f"{self.name} byte {offset - start} of {self.names[i]}, which has {size} bytes"
        return at + (f" ({distance} outside)" if distance else "")

    def spread(self, position: Array, size: int) -> Array:
        """Granules of each access, [lanes, size / granule]."""
        return (position // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def check_valid(self, position: Array, size: int, fail: Fail) -> None:
        valid = self.valid[self.spread(position, size)]
        if not valid.all():
            message = "bytes that were never written (or are still in flight by cp.async)"
            fail(~valid.all(1), lambda i: f"reads {message} at {self.where(position[i] % self.stride)}")

    def check_read(self, position: Array, size: int, thread: Array, fail: Fail, constant: bool) -> None:
        """A plain read: of written bytes, not racing with a write, and of what nobody writes if it is a .nc load."""
        self.check_valid(position, size, fail)
        granules, thread = self.spread(position, size), thread[:, None]
        if constant:
            if (wrong := (self.writer[granules] >= 0).any(1)).any():
                fail(wrong, lambda i: "ld.global.nc of memory that this kernel writes")
            self.constant[granules] = True
            return
        if not self.races:
            return
        self.check_race("reads", "wrote", position, granules, thread, fail)
        before, warp = self.reader[granules], thread >> 5
        fresh = ~self.order.racing(before, self.read[granules], thread)
        block = warp // self.order.warps
        many = np.where((before >> 5) // self.order.warps != block, 2, (before >> 5 != warp).astype(np.int8))
        many = np.where(fresh, 0, np.maximum(many, self.readers[granules])).astype(np.int8)
        self.readers[granules] = np.where(self.readers[granules] == 2, 2, many)
        self.reader[granules] = thread
        self.read[granules] = self.order.now
        last = self.reader[granules] >> 5
        if (last != warp).any():
            others = np.where(last // self.order.warps != block, 2, 1).astype(np.int8)
            np.maximum.at(self.readers, granules[last != warp], others[last != warp])

    def check_write(
        self, position: Array, size: int, thread: Array, fail: Fail, same: Array | bool = False, atomic: bool = False
    ) -> None:
        """A write or the start of an asynchronous one; `same` marks lanes that leave the bytes as they are."""
        granules, thread = self.spread(position, size), thread[:, None]
        if (wrong := self.constant[granules].any(1)).any():
            fail(wrong, lambda i: "writes memory that this kernel reads by ld.global.nc")
        if self.races:
            harmless = np.broadcast_to(same, position.shape)[:, None]
            both_atomic = self.atomic[granules] if atomic else False
            self.check_race("writes", "wrote", position, granules, thread, fail, harmless | both_atomic)
            self.check_race("writes", "read", position, granules, thread, fail, harmless)
        self.writer[granules] = thread
        self.written[granules] = self.order.now
        self.atomic[granules] = atomic

    def check_race(
        self, verb: str, did: str, position: Array, granules: Array, thread: Array, fail: Fail,
        harmless: Array | bool = False,
    ) -> None:  # fmt: skip
        """Fail if what others last `did` to the granules is not ordered before this access."""
        others, times = (self.writer, self.written) if did == "wrote" else (self.reader, self.read)
        other, time = others[granules], times[granules]
        racing = self.order.racing(other, time, thread)
        if did == "read" and (several := self.readers[granules] > 0).any():
            block = (thread >> 5) // self.order.warps
            ordered = ((other >> 5) // self.order.warps == block) & (time < self.order.block_time[block])
            racing |= several & ~(ordered & (self.readers[granules] == 1))
        racing &= ~np.broadcast_to(harmless, racing.shape)
        if not racing.any():
            return

        def message(i: int) -> str:
            who = int(other[i][racing[i]][0])
            block, warp = divmod(who >> 5, self.order.warps)
            lane = f"lane {who & 31} of warp {warp} of block {block}"
            return f"race: {verb} {self.where(position[i] % self.stride)}, which {lane} {did} with no barrier between"

        fail(racing.any(1), message)
