"""Memory that checks every access: bounds, alignment, bytes never written, races, read-only data.

An `Arena` is one address space: `copies` of one layout (a block's shared memory), or one (global).
Data that no thread may touch lies between the variables. Two accesses to the same bytes by
different threads, at least one a write and not both atomic, are a race unless ordered: by program
order, by a barrier of the block, or by bar.warp.sync within a warp. Same-value writes are allowed.
A check calls `fail(wrong, message)` with the lanes whose access is wrong and the words, or those
for lane number i; positions are those in `bytes`, size is of one lane's access in bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .parse import UNSIGNED

Array = np.ndarray
Message = str | Callable[[int], str]
GUARD, MOST_GUARD = (
    256,
    1 << 20,
)  # bytes before the first variable and after each: as many as it has, within these


class Order:
    """What is ordered before what: the time of each block's last barrier and of each warp's last
    bar.warp.sync."""

    def __init__(self, blocks: int, warps: int) -> None:
        self.warps, self.now = (
            warps,
            1,
        )  # warps a block; a thread's number is ((block · warps) + warp) · 32 + lane
        self.block_time = np.zeros(blocks, np.int64)
        self.warp_time = np.zeros(blocks * warps, np.int64)

    def racing(self, other: Array, time: Array, thread: Array) -> Array:
        """Accesses by `other` at `time` that are not ordered before what `thread` does now (−1:
        nobody)."""
        racing = (other != thread) & (other >= 0)
        if racing.any():
            warp = thread >> 5
            block = warp // self.warps
            same_block = (other >> 5) // self.warps == block
            racing &= ~(same_block & (time < self.block_time[block]))
            racing &= ~((other >> 5 == warp) & (time < self.warp_time[warp]))
        return racing


class Arena:
    """granule: the bytes that are tracked together."""

    def __init__(
        self,
        name: str,
        base: int,
        granule: int,
        order: Order,
        races: bool,
        fail: Callable[[Array, Message], None],
    ) -> None:
        self.name = name
        self.base = base
        self.granule = granule
        self.order = order
        self.races = races
        self.fail = fail
        self.clear()

    def clear(self) -> None:
        """No variable yet."""
        self.names: list[str] = ["no variable"]
        self.places: list[tuple[int, int, bool]] = [(0, 0, False)]  # offset, size, read-only
        self.size = GUARD

    def add(
        self, name: str, size: int, align: int = 256, read_only: bool = False, offset: int = 0
    ) -> int:
        """Lay out a variable, in shared memory at no better alignment than its own; its address, so
        many bytes after a multiple of ``align``."""
        start = -(-self.size // align) * align + offset
        start += align if self.name == "shared" and start % (2 * align) == 0 else 0
        self.names.append(name)
        self.places.append((start, size, read_only))
        self.size = start + size + min(max(size, GUARD), MOST_GUARD)
        return self.base + start

    def allocate(self, copies: int) -> None:
        self.stride = -(-self.size // 256) * 256
        self.bytes = np.empty(copies * self.stride, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.owner = np.zeros(self.stride, np.int16)
        for number, (start, size, _) in enumerate(self.places):
            self.owner[start : start + size] = number
        self.read_only = np.array([place[2] for place in self.places])
        granules = copies * self.stride // self.granule
        self.flags = np.empty((4, granules), bool)
        # constant: read by .nc; flying: a cp.async to here has not been waited for
        self.valid, self.atomic, self.constant, self.flying = self.flags
        # [slot, (thread, time), granule]: the last write; the last read, and the last before it
        # from another thread, another warp, another block. If any read races with a write, one of
        # these four does.
        self.writes, self.reads = (
            np.empty((1, 2, granules), np.int64),
            np.empty((4, 2, granules), np.int64),
        )
        self.reset()

    def reset(self) -> None:
        """All bytes poisoned (0xFF: NaN in every float type) and unwritten."""
        self.bytes.fill(0xFF)
        self.flags.fill(False)
        self.writes[:, 0].fill(-1)  # nobody; their times don't matter
        self.reads[:, 0].fill(-1)

    def put(self, address: int, data: Array, valid: bool = True) -> None:
        start = address - self.base
        self.bytes[start : start + len(data)] = data
        self.valid[start // self.granule : -(-(start + len(data)) // self.granule)] = valid

    def locate(self, address: Array, copy: Array | int, size: int, write: bool) -> Array:
        """Positions of an access, after the checks of alignment and bounds."""
        offset = (address - np.uint64(self.base)).astype(np.int64)
        if (wrong := offset & (size - 1) != 0).any():
            self.fail(
                wrong, lambda i: f"{size}-byte access to {self.where(offset[i])} is misaligned"
            )
        inside = (offset >= 0) & (offset <= self.stride - size)
        safe = offset if inside.all() else np.where(inside, offset, 0)
        owner = self.owner[safe]
        if (wrong := (owner == 0) | (owner != self.owner[safe + (size - 1)])).any():
            self.fail(wrong, lambda i: f"{size}-byte access out of bounds: {self.where(offset[i])}")
        if write and (wrong := self.read_only[owner]).any():
            self.fail(wrong, lambda i: f"write to read-only memory: {self.where(offset[i])}")
        return offset + copy * self.stride

    def where(self, offset: int) -> str:
        """In words: inside or near which variable."""
        near = [
            (max(s - offset, offset - s - n + 1, 0), i)
            for i, (s, n, _) in enumerate(self.places)
            if i
        ]
        if not near or min(near)[0] > 1 << 20:
            return f"{self.name} address {self.base + int(offset):#x}, near no variable"
        distance, i = min(near)
        start, size, _ = self.places[i]
        at = f"{self.name} byte {offset - start} of {self.names[i]}, which has {size} bytes"
        return at + (f" ({distance} outside)" if distance else "")

    def spread(self, position: Array, size: int) -> Array:
        """Granules of each access, [lanes, size / granule]."""
        return (position // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def check_valid(self, position: Array, size: int) -> None:
        valid = self.valid[self.spread(position, size)]
        if not valid.all():
            message = "bytes that were never written (or are still in flight by cp.async)"
            self.fail(
                ~valid.all(1),
                lambda i: f"reads {message} at {self.where(position[i] % self.stride)}",
            )

    def check_read(self, position: Array, size: int, thread: Array, constant: bool) -> None:
        """A plain read: of written bytes, not racing with a write, and of what nobody writes if it
        is a .nc load."""
        self.check_valid(position, size)
        granules, thread = self.spread(position, size), thread[:, None]
        if constant:
            if (wrong := (self.writes[0, 0, granules] >= 0).any(1)).any():
                self.fail(wrong, "ld.global.nc of memory that this kernel writes")
            self.constant[granules] = True
        elif self.races:
            self.check_race("reads", "wrote", position, granules, thread)
            before = self.reads[0][:, granules]
            now = self.note(self.reads, granules, thread)
            last = self.reads[0, 0, granules]  # of the lanes that read the same bytes now
            for access in (before, now):
                if not ((access[0] != last) & (access[0] >= 0)).any():
                    continue  # of each slot's kind there is none
                for slot, unit in enumerate((1, 32, 32 * self.order.warps), start=1):
                    other = access[0] // unit != last // unit
                    self.reads[slot][:, granules[other]] = access[:, other]

    def check_write(
        self,
        position: Array,
        size: int,
        thread: Array,
        same: Array | bool = False,
        atomic: bool = False,
    ) -> None:
        """A write or the start of an asynchronous one; `same` marks lanes that leave the bytes as
        they are."""
        granules, thread = self.spread(position, size), thread[:, None]
        if (wrong := self.constant[granules].any(1)).any():
            self.fail(wrong, "writes memory that this kernel reads by ld.global.nc")
        if (wrong := self.flying[granules].any(1)).any():
            self.fail(
                wrong,
                lambda i: (
                    "overwrites bytes that are still in flight by cp.async at "
                    f"{self.where(position[i] % self.stride)}"
                ),
            )
        if self.races:
            harmless = np.broadcast_to(same, position.shape)[:, None]
            both_atomic = self.atomic[granules] if atomic else False
            self.check_race("writes", "wrote", position, granules, thread, harmless | both_atomic)
            self.check_race("writes", "read", position, granules, thread, harmless)
        self.note(self.writes, granules, thread)
        self.atomic[granules] = atomic

    def note(self, accesses: Array, granules: Array, thread: Array) -> Array:
        """Put down that these threads made the last access, now."""
        now = np.stack(np.broadcast_arrays(thread, self.order.now, granules)[:2])
        accesses[0][:, granules] = now
        return now

    def check_race(
        self,
        verb: str,
        did: str,
        position: Array,
        granules: Array,
        thread: Array,
        harmless: Array | bool = False,
    ) -> None:
        """Fail if what others last `did` to the granules is not ordered before this access."""
        for other, time in (self.writes if did == "wrote" else self.reads)[:, :, granules]:
            racing = self.order.racing(other, time, thread)
            if racing.any() and (racing := racing & ~np.asarray(harmless)).any():
                who = int(other[racing][0])  # of the first lane, of which `fail` tells
                block, warp = divmod(who >> 5, self.order.warps)
                place = self.where(position[racing.any(1)][0] % self.stride)
                lane = f"lane {who & 31} of warp {warp} of block {block}"
                self.fail(
                    racing.any(1),
                    f"race: {verb} {place}, which {lane} {did} with no barrier between",
                )
