"""The machine: registers of a chunk of blocks, warps that diverge and reconverge, barriers, what an
error says.

Threads are lanes of NumPy arrays. A group of lanes at the same instruction runs as far as it stays
together; of the lanes that can run, those at the lowest instruction go first, so that warps
reconverge. Each block's warps are split at random into two cohorts; one runs until it waits, then
the other, in random order after every barrier, so that a missing barrier shows in the result. All
is fixed by the seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import instructions
from .memory import Arena, Message, Order
from .parse import DTYPES, Immediate, Instruction, Kernel, Operand, PTXError, Register, Symbol

Array = np.ndarray
Lanes = slice | Array
RUN, EXITED, AT_WARP, AT_BARRIER = range(4)
STOP = object()  # what a step returns when it has set its lanes' own next instructions
FAR = 1 << 30
GLOBAL_START = 1 << 44


@dataclass
class Report:
    """What a launch did. Instructions are counted once a thread; bytes, by address space."""

    instructions: int = 0
    histogram: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    sectors: int = (
        0  # 32-byte pieces of global memory that each warp's access touches, if they are counted
    )


def rubbish(dtype: type) -> int:
    """Each byte of a register that was never written."""
    return 1 if dtype == np.bool_ else 0xAB


class Machine:
    """One kernel with room for so many blocks at once, used for one launch after the other: `begin`
    forgets the last one, `run` executes the blocks in chunks.

    dynamic: bytes of shared variables without a size.
    """

    def __init__(
        self,
        kernel: Kernel,
        block: tuple[int, ...],
        blocks: int,
        dynamic: int,
        *,
        races: bool,
        sectors: bool,
    ) -> None:
        self.kernel = kernel
        self.block = block
        self.blocks = blocks
        self.counts_sectors = sectors
        self.threads = int(np.prod(block))
        self.warps = -(-self.threads // 32)
        self.lanes = self.blocks * self.warps * 32
        self.index = np.arange(self.lanes)
        self.lane, self.warp = self.index & 31, self.index >> 5  # warp: by place in the arrays
        self.program = [*kernel.instructions, Instruction("ret", (), None, 0, "ret; (end)")]
        types = [
            i.opcode.split(".")[-1] for i in self.program if i.opcode.startswith(("ld.", "st."))
        ]
        granule = min(
            [4, *(np.dtype(DTYPES.get(type, np.uint8)).itemsize for type in types)]
        )  # the smallest access
        self.order = Order(0, self.warps)
        self.memory = Arena("global", GLOBAL_START, granule, self.order, races, self.fail)
        self.shared = Arena("shared", 0, granule, self.order, races, self.fail)
        self.arenas = {"global": self.memory, "shared": self.shared}
        self.symbols: dict[str, int] = {}
        self.registers: dict[Register, Array] = {}
        self.special = {
            f"%{name}.{axis}": np.zeros(self.lanes, np.uint32)
            for name in ("tid", "ntid", "ctaid", "nctaid")
            for axis in "xyz"
        }
        self.pc, self.copy_group = np.zeros((2, self.lanes), np.int64)
        self.state = np.zeros(self.lanes, np.int8)
        self.steps: list[instructions.Step] = [self.bind] * len(self.program)
        for name, align, size in kernel.shared:  # places of shared variables
            if size:
                self.symbols[name] = self.shared.add(name, size, align)
        unsized = [
            variable for variable in self.kernel.shared if not variable.size
        ]  # all are the same bytes
        start = self.shared.add(
            "dynamic shared memory", dynamic, max((v.align for v in unsized), default=16)
        )
        self.symbols |= {variable.name: start for variable in unsized}
        self.shared.allocate(self.blocks)
        self.special["%dynamic_smem_size"] = np.full(self.lanes, dynamic, np.uint32)

    def begin(self, grid: tuple[int, ...], seed: int, limit: int) -> None:
        """A new launch: nothing has run, and no array has a place."""
        self.grid, self.total = grid, int(np.prod(grid))
        self.seed, self.limit = seed, limit
        self.rng, self.report = np.random.default_rng(seed), Report()
        self.order = self.memory.order = self.shared.order = Order(self.total, self.warps)
        self.memory.clear()
        for name, sizes in (("ntid", self.block), ("nctaid", grid)):
            for axis, size in zip("xyz", sizes, strict=True):
                self.special[f"%{name}.{axis}"].fill(size)

    def run(self, parameters: dict[str, bytes]) -> Report:
        self.parameters = parameters
        if not self.kernel.bound:  # once, also what is never reached, so that all of it is known
            for place, instruction in enumerate(self.program):
                self.at = place
                self.steps[place] = instructions.bind(self, instruction)
            self.kernel.bound = True
        self.counts = np.zeros(len(self.program), np.int64)
        numbers = self.rng.permutation(self.total)
        for start in range(0, len(numbers), self.blocks):
            self.run_blocks(numbers[start : start + self.blocks])
        self.report.instructions = int(self.counts.sum())
        for place in np.flatnonzero(self.counts):
            self.report.histogram[self.program[place].opcode] += int(self.counts[place])
        return self.report

    def bind(self, lanes: Lanes) -> object:
        """In the place of a step that has not been needed: make it, and take it."""
        self.steps[self.at] = instructions.bind(self, self.program[self.at])
        return self.steps[self.at](lanes)

    def run_blocks(self, numbers: Array) -> None:
        """Execute these blocks (linear numbers), at most as many as there are copies of shared
        memory."""
        blocks, warps = self.blocks, self.warps
        first = self.rng.permuted(np.tile(np.arange(warps), (blocks, 1)), axis=1) < (warps + 1) // 2
        slots = np.argsort(~first.ravel(), kind="stable")  # warps in the order of their cohorts
        cut = int(first.sum()) * 32
        slot, warp = slots // warps, slots % warps
        self.copy = np.repeat(slot, 32)  # which copy of shared memory
        thread = np.repeat(warp * 32, 32) + self.lane
        self.block_number = np.resize(numbers, blocks)[self.copy]
        self.thread = self.block_number * (warps * 32) + thread
        for name, linear, shape in (
            ("tid", thread, self.block),
            ("ctaid", self.block_number, self.grid),
        ):
            for axis, place in zip(
                "zyx", np.unravel_index(linear % np.prod(shape), shape[::-1]), strict=True
            ):
                self.special[f"%{name}.{axis}"][:] = place
        for register in self.registers.values():
            register.view(np.uint8).fill(rubbish(register.dtype))
        self.shared.reset()
        self.pending: list[instructions.Copy] = []
        self.copy_group.fill(0)
        self.pc.fill(0)
        self.state[:] = np.where((thread < self.threads) & (self.copy < len(numbers)), RUN, EXITED)
        cohorts = [(0, cut), (cut, self.lanes)]
        while True:
            for number in self.rng.permutation(2):
                self.run_cohort(*cohorts[number])
            if (self.state == EXITED).all():
                break
            self.open_barriers()

    def run_cohort(self, low: int, high: int) -> None:
        """Run these lanes until each has exited or waits at a barrier."""
        pc, state = self.pc[low:high], self.state[low:high]
        while low < high:
            running = state == RUN
            if not running.any():
                if not self.wake(low, high):
                    return
                continue
            places = np.where(running, pc, FAR)
            first = places.min()
            chosen = places == first
            others = places[~chosen]
            lanes = slice(low, high) if not len(others) else low + np.flatnonzero(chosen)
            self.run_group(
                self.compact(lanes), int(first), int(others.min()) if len(others) else FAR
            )

    def compact(self, lanes: Lanes) -> Lanes:
        """A slice where the indices are consecutive: views are faster than gathers."""
        if isinstance(lanes, slice) or lanes[-1] - lanes[0] + 1 != len(lanes):
            return lanes
        return slice(int(lanes[0]), int(lanes[-1]) + 1)

    def run_group(self, lanes: Lanes, pc: int, until: int) -> None:
        """Run lanes that are together until they part, wait, or reach lanes that wait for them."""
        self.running, count = lanes, len(self.index[lanes])
        self.first = self.at = pc
        self.check_limit()
        while pc < until:
            self.at = pc
            self.counts[pc] += count
            self.order.now += 1
            following = self.steps[pc](lanes)
            if following is STOP:
                return
            if following is None:
                pc += 1
            else:
                pc = following
                self.check_limit()
        self.pc[lanes] = pc

    def check_limit(self) -> None:
        if self.order.now > self.limit:
            self.fail(None, f"still running after {self.limit} steps: an endless loop?")

    def wake(self, low: int, high: int) -> bool:
        """Nothing runs: see whether lanes that wait within their warp now can go on, because others
        have exited."""
        waiting = low + np.flatnonzero(self.state[low:high] == AT_WARP)
        if not len(waiting):
            return False
        for place in np.unique(self.pc[waiting]):
            lanes = waiting[self.pc[waiting] == place]
            self.state[lanes] = RUN
            self.run_group(lanes, int(place), int(place) + 1)
            if (self.state[lanes] != AT_WARP).any():
                return True
        self.at = int(self.pc[waiting].min())
        self.running = waiting[self.pc[waiting] == self.at]
        self.fail(
            None,
            "lanes missing: others of the warp are elsewhere, and this instruction waits for "
            "them for ever",
        )
        return False

    def arrive(self, lanes: Lanes) -> Lanes | None:
        """Lanes whose whole warp (all that have not exited) is here; the others wait.

        Returns the lanes that go on, or None; if these are not just `lanes`, their pc is set and
        the step must STOP.
        """
        index = self.index[lanes]
        if isinstance(lanes, slice) and len(index) % 32 == 0 and lanes.start % 32 == 0:
            return lanes
        here = self.index[(self.state == AT_WARP) & (self.pc == self.at)]
        index = np.sort(np.concatenate([index, here]))
        present = np.bincount(self.warp[index], minlength=len(self.lane) // 32)
        alive = np.bincount(self.warp[self.state != EXITED], minlength=len(present))
        ready = (present == alive)[self.warp[index]]
        self.pc[index] = self.at
        self.state[index] = np.where(ready, RUN, AT_WARP)
        return self.compact(index[ready]) if ready.any() else None

    def open_barriers(self) -> None:
        """All wait, so that all have come."""
        lanes = self.index[self.state == AT_BARRIER]
        self.report.barriers += len(np.unique(self.copy[lanes]))
        self.order.now += 1
        self.order.block_time[self.block_number[lanes]] = self.order.now
        self.order.now += 1
        self.state[lanes] = RUN
        self.pc[lanes] += 1

    def exit(self, lanes: Lanes) -> None:
        """End these threads; to leave a barrier's warp mates behind after other work is
        divergence."""
        if self.first != self.at and (self.state == AT_WARP).any():
            mates = self.index[(self.state == AT_WARP) & np.isin(self.warp, self.warp[lanes])]
            stuck = [i for i in mates if self.program[self.pc[i]].opcode == "bar.sync"]
            if stuck:
                self.running, self.at = np.array(stuck), int(self.pc[stuck[0]])
                self.fail(None, "barrier in divergent code: the rest of the warp went on")
        self.state[lanes] = EXITED

    def count(self, arena: Arena, lanes: Lanes, position: Array, size: int, write: bool) -> None:
        """Bytes of an access, and its sectors of global memory (each lane's 16 bytes at most lie in
        one)."""
        (self.report.written if write else self.report.read)[arena.name] += size * len(position)
        if self.counts_sectors and arena is self.memory:
            warp = self.thread[lanes] >> 5
            self.report.sectors += len(np.unique(warp * (arena.stride // 32) + position // 32))

    def reader(self, operand: Operand, type: str) -> Callable[[Lanes], Array]:
        """A function from lanes to the operand's values in the type's dtype."""
        if isinstance(operand, Immediate):
            value = operand.value(type)
            return lambda lanes: value
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise self.unsupported(f"the name {operand.name}")
            address = np.array([self.symbols[operand.name]], DTYPES[type])
            return lambda lanes: address
        view = self.view(operand, type)
        return lambda lanes: view[lanes]

    def writer(self, operand: Operand, type: str) -> Callable[[Lanes, Array], None]:
        """A function that stores values of the type's dtype."""
        return self.view(operand, type).__setitem__

    def view(self, operand: Operand, type: str) -> Array:
        """A register over all lanes."""
        if not isinstance(operand, Register):
            raise self.unsupported(f"the operand {operand}")
        if operand.type == "special":
            if operand.name not in self.special:
                raise self.unsupported(f"special register {operand.name}")
            array = self.special[operand.name]
        else:
            if operand not in self.registers:
                self.registers[operand] = np.empty(self.lanes, DTYPES[operand.type])
                self.registers[operand].view(np.uint8).fill(rubbish(DTYPES[operand.type]))
            array = self.registers[operand]
        dtype = np.dtype(DTYPES[type])
        if (array.dtype.kind == "b") != (
            dtype.kind == "b"
        ) or dtype.itemsize != array.dtype.itemsize:
            raise self.unsupported(f".{operand.type} {operand.name} as .{type}")
        return array.view(dtype)

    def unsupported(self, what: str) -> PTXError:
        instruction = self.program[self.at]
        return PTXError(
            f"{self.kernel.name}, line {instruction.line}: `{instruction.text}`: {what} is not "
            "supported"
        )

    def fail(self, wrong: Array | None, message: Message) -> None:
        """Raise for the first of the running lanes where `wrong`."""
        first = 0 if wrong is None else int(np.flatnonzero(wrong)[0])
        lane = int(self.index[self.running][first])
        instruction = self.program[self.at]
        block, thread = (
            tuple(int(self.special[f"%{n}.{x}"][lane]) for x in "xyz") for n in ("ctaid", "tid")
        )
        raise PTXError(
            f"{self.kernel.name}, line {instruction.line}: `{instruction.text}`: block "
            f"{block}, thread {thread}: "
            f"{message if isinstance(message, str) else message(first)}"
        )
