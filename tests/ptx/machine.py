"""The machine: registers of a chunk of blocks, warps that diverge and reconverge, barriers, what an error says.

Threads are lanes of NumPy arrays. A group of lanes at the same instruction runs as far as it stays together; of the
lanes that can run, those at the lowest instruction go first, so that warps reconverge. Each block's warps are split at
random into two cohorts; one runs until it waits, then the other, in random order after every barrier, so that a
missing barrier shows in the result. All is fixed by the seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import instructions
from .memory import GLOBAL_START, Arena, Order
from .parse import DTYPES, Function, Immediate, Instruction, Module, Not, Operand, PTXError, Register, Symbol, Variable

Array = np.ndarray
Lanes = slice | Array
RUN, EXITED, AT_WARP, AT_BARRIER = range(4)
STOP = object()  # what a step returns when it has set its lanes' own next instructions
MOST_LANES = 16384
FAR = 1 << 30


@dataclass
class Report:
    """What a launch did. Instructions are counted once a thread; bytes, by address space."""

    instructions: int = 0
    histogram: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    longest_warp: int = 0


class Machine:
    """One kernel with memory laid out; `run_blocks` executes a chunk of blocks."""

    def __init__(
        self, module: Module, kernel: Function, grid: tuple[int, int, int], block: tuple[int, int, int],
        memory: Arena, parameters: Arena, shared: int, seed: int, limit: int, races: bool,
    ) -> None:  # fmt: skip
        self.module, self.kernel, self.grid, self.block = module, kernel, grid, block
        self.rng, self.seed, self.limit, self.races = np.random.default_rng(seed), seed, limit, races
        self.threads = int(np.prod(block))
        self.warps = -(-self.threads // 32)
        self.report = Report()
        self.functions = reachable(module, kernel)
        self.program: list[Instruction] = []
        self.owner: list[Function] = []
        self.start: dict[str, int] = {}
        for function in self.functions:
            self.start[function.name] = len(self.program)
            self.program += [*function.instructions, Instruction("ret", (), None, 0, "ret; (end)", (0,))]
            self.owner += [function] * (len(function.instructions) + 1)
        self.memory, self.parameters = memory, parameters
        granule = memory.granule
        self.shared, self.local = Arena("shared", 0, granule), Arena("local", 0, granule)
        self.arenas = {"global": memory, "const": memory, "param": parameters}
        self.arenas |= {"shared": self.shared, "local": self.local}
        self.symbols: dict[str, tuple[Arena, int]] = {n: (memory, GLOBAL_START + o) for n, o in memory.offsets.items()}
        self.lay_out(shared)
        self.fenced = any(i.opcode.startswith(("membar", "fence")) for i in self.program)

    def lay_out(self, dynamic: int) -> None:
        """Places of shared and local variables and of functions' parameters."""
        owned = [v for f in self.functions for v in f.variables.values()]
        extern: list[Variable] = []
        for variable in [*self.module.variables.values(), *owned]:
            if variable.space == "shared" and variable.size is None:
                extern.append(variable)
            elif variable.space == "shared":
                address = self.shared.add(variable.name, variable.size, variable.align)
                self.symbols[variable.name] = self.shared, address
            elif variable.space == "local" or (variable.space == "param" and variable not in self.kernel.parameters):
                self.symbols[variable.name] = self.local, self.local.add(variable.name, variable.size, variable.align)
            elif variable.space == "param":
                self.symbols[variable.name] = self.parameters, self.parameters.offsets[variable.name]
        align = max((v.align for v in extern), default=16)
        start = self.shared.add("dynamic shared memory", dynamic, align)
        self.symbols |= {v.name: (self.shared, start) for v in extern}

    def prepare(self, blocks: int) -> None:
        """Arrays for `blocks` blocks at once, and the instructions bound to them."""
        self.lanes = blocks * self.warps * 32
        self.index = np.arange(self.lanes)
        self.lane = (self.index & 31).astype(np.uint32)
        self.warp = self.index >> 5  # by place in the arrays
        self.registers: dict[str, Array] = {}
        self.special: dict[str, Array] = {}
        self.shared.allocate(blocks)
        self.local.allocate(self.lanes if self.local.offsets else 1, tracked=False)
        self.order = Order(int(np.prod(self.grid)), self.warps)
        self.pc = np.zeros(self.lanes, np.int64)
        self.state = np.zeros(self.lanes, np.int8)
        self.back = {f.name: np.zeros(self.lanes, np.int64) for f in self.functions}
        self.barrier = np.zeros(self.lanes, np.int64)
        self.expected = np.zeros(self.lanes, np.int64)
        self.vote = np.zeros(self.lanes, bool)
        self.finish: dict[int, tuple[Callable, str]] = {}
        self.copy_group = np.zeros(self.lanes, np.int64)
        self.carry = np.zeros(self.lanes, np.int64)
        names = ("tid", "ntid", "ctaid", "nctaid")
        for name in [f"%{n}.{axis}" for n in names for axis in "xyz"] + ["%laneid", "%warpid"]:
            self.special[name] = np.zeros(self.lanes, np.uint32)
        for axis, size, count in zip("xyz", self.block, self.grid, strict=True):
            self.special[f"%ntid.{axis}"][:] = size
            self.special[f"%nctaid.{axis}"][:] = count
        self.special["%laneid"][:] = self.lane
        one = np.uint32(1) << self.lane
        masks = {"eq": one, "lt": one - 1, "le": one | (one - 1), "gt": ~(one | (one - 1)), "ge": ~(one - 1)}
        self.special |= {f"%lanemask_{name}": mask.astype(np.uint32) for name, mask in masks.items()}
        self.special["%dynamic_smem_size"] = np.full(self.lanes, self.shared.places[-1][1], np.uint32)
        self.steps: list[instructions.Step] = []
        for place, instruction in enumerate(self.program):
            self.at = place
            self.steps.append(instructions.bind(self, instruction))
        self.counts = np.zeros(len(self.program), np.int64)

    def run_blocks(self, numbers: Array) -> None:
        """Execute these blocks (linear numbers), at most as many as prepared for."""
        blocks, warps = self.lanes // (32 * self.warps), self.warps
        first = self.rng.permuted(np.tile(np.arange(warps), (blocks, 1)), axis=1) < (warps + 1) // 2
        slots = np.argsort(~first.ravel(), kind="stable")  # warps in the order of their cohorts
        cut = int(first.sum()) * 32
        slot, warp = slots // warps, slots % warps
        self.copy = np.repeat(slot, 32)  # which copy of shared memory
        thread = np.repeat(warp * 32, 32) + self.lane.astype(np.int64)
        padded = np.resize(numbers, blocks)
        self.block_number = padded[self.copy]
        self.thread = self.block_number * (warps * 32) + thread
        for name, linear, shape in (("tid", thread, self.block), ("ctaid", self.block_number, self.grid)):
            self.special[f"%{name}.x"][:] = linear % shape[0]
            self.special[f"%{name}.y"][:] = linear // shape[0] % shape[1]
            self.special[f"%{name}.z"][:] = linear // (shape[0] * shape[1])
        self.special["%warpid"][:] = thread >> 5
        for register in self.registers.values():  # registers start as rubbish
            register.fill(0xAB if register.dtype != bool else True)
        self.shared.reset()
        self.local.reset()
        self.pending: list[instructions.Copy] = []
        self.copy_group.fill(0)
        self.arrived = np.zeros((blocks, 16), np.int64)
        self.length = np.zeros(blocks * warps, np.int64)
        self.pc.fill(self.start[self.kernel.name])
        self.state[:] = np.where((thread < self.threads) & (self.copy < len(numbers)), RUN, EXITED)
        cohorts = [(0, cut), (cut, self.lanes)]
        while True:
            for number in self.rng.permutation(2):
                self.run_cohort(*cohorts[number])
            if (self.state == EXITED).all():
                break
            self.release()
        self.report.longest_warp = max(self.report.longest_warp, int(self.length.max()))

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
            self.run_group(self.compact(lanes), int(first), int(others.min()) if len(others) else FAR)

    def compact(self, lanes: Lanes) -> Lanes:
        """A slice where the indices are consecutive: views are faster than gathers."""
        if isinstance(lanes, slice) or lanes[-1] - lanes[0] + 1 != len(lanes):
            return lanes
        return slice(int(lanes[0]), int(lanes[-1]) + 1)

    def run_group(self, lanes: Lanes, pc: int, until: int) -> None:
        """Run lanes that are together until they part, wait, or reach lanes that wait for them."""
        index = self.index[lanes]
        self.first = self.at = pc
        self.check_limit(lanes)
        executed = 0
        while pc < until:
            self.at = pc
            executed += 1
            self.counts[pc] += len(index)
            self.order.now += 1
            following = self.steps[pc](lanes)
            if following is None:
                pc += 1
            elif following is STOP:
                break
            else:
                pc = following
                self.check_limit(lanes)
        else:
            self.pc[lanes] = pc
        self.length[np.unique(self.warp[lanes])] += executed

    def check_limit(self, lanes: Lanes) -> None:
        if self.order.now > self.limit:
            self.fail(lanes, None, lambda i: f"still running after {self.limit} steps: an endless loop?")

    def wake(self, low: int, high: int) -> bool:
        """Nothing runs: see whether lanes that wait within their warp now can go on, because others have exited."""
        waiting = low + np.flatnonzero(self.state[low:high] == AT_WARP)
        if not len(waiting):
            return False
        for place in np.unique(self.pc[waiting]):
            lanes = waiting[self.pc[waiting] == place]
            self.state[lanes] = RUN
            self.run_group(lanes, int(place), int(place) + 1)
            if (self.state[lanes] != AT_WARP).any():
                return True
        lane = waiting[0]
        self.at = int(self.pc[lane])
        mates = self.index[self.warp == self.warp[lane]]
        missing = mates[(self.state[mates] != EXITED) & (self.pc[mates] != self.at)]
        where = f"{len(missing)} lanes of the warp are elsewhere" + (
            f", the first at line {self.program[self.pc[missing[0]]].line}" if len(missing) else ""
        )
        self.fail(waiting[:1], None, lambda i: f"lanes missing: {where}, and this instruction waits for them for ever")

    def arrive(self, lanes: Lanes, masks: Array | None) -> Lanes | None:
        """Lanes whose whole warp (those in `masks` that have not exited) is here; the others wait.

        Returns the lanes that go on, or None; if these are not just `lanes`, their pc is set and the step must STOP.
        """
        index = self.index[lanes]
        here = self.index[(self.state == AT_WARP) & (self.pc == self.at)]
        if isinstance(lanes, slice) and len(index) % 32 == 0 and lanes.start % 32 == 0:
            if masks is None or (masks[lanes] == 0xFFFFFFFF).all():
                return lanes
        index = np.sort(np.concatenate([index, here])) if len(here) else index
        bit = np.uint32(1) << self.lane
        present, alive = (np.zeros(self.lanes // 32, np.uint32) for _ in range(2))
        np.bitwise_or.at(present, self.warp[index], bit[index])
        live = self.index[self.state != EXITED]
        np.bitwise_or.at(alive, self.warp[live], bit[live])
        mask = np.full(len(index), 0xFFFFFFFF, np.uint32) if masks is None else masks[index]
        if (wrong := mask & bit[index] == 0).any():
            self.fail(index, wrong, lambda i: f"the lane itself is not in its member mask {mask[i]:#x}")
        warp = self.warp[index]
        ready = mask & alive[warp] & ~present[warp] == 0
        team, count = instructions.teams(self, index, mask)
        members = np.bincount(team, 2.0 ** self.lane[index], count)[team].astype(np.uint32)
        if (wrong := ready & (members != mask & alive[warp])).any():
            self.fail(index, wrong, lambda i: f"lanes named in its member mask {mask[i]:#x} come with another mask")
        self.pc[index] = self.at
        self.state[index] = np.where(ready, RUN, AT_WARP)
        return self.compact(index[ready]) if ready.any() else None

    def release(self) -> None:
        """All wait: open the barriers that are complete."""
        waiting = self.index[self.state == AT_BARRIER]
        if not len(waiting):
            return
        blocks = len(self.arrived)
        key = self.copy[waiting] * 16 + self.barrier[waiting]
        count = np.bincount(key, minlength=blocks * 16) + self.arrived.ravel()
        live = np.bincount(self.copy[self.state != EXITED], minlength=blocks)
        wanted = np.where(self.expected[waiting] > 0, self.expected[waiting], live[self.copy[waiting]])
        opened = count[key] == wanted
        if not opened.any():
            self.at = int(self.pc[waiting[0]])
            self.fail(
                waiting[:1], None,
                lambda i: f"deadlock: {count[key[0]]} threads of {wanted[0]} are at barrier {self.barrier[waiting[0]]}",
            )  # fmt: skip
        lanes = waiting[opened]
        for place in np.unique(self.pc[lanes]):
            self.at = int(place)
            instructions.finish_barrier(self, lanes[self.pc[lanes] == place], lanes)
        self.report.barriers += len(np.unique(key[opened]))
        self.arrived.ravel()[np.unique(key[opened])] = 0
        self.order.now += 1
        self.order.block_time[self.block_number[lanes]] = self.order.now
        self.order.warp_time[self.thread[lanes] >> 5] = self.order.now
        self.order.now += 1
        self.state[lanes] = RUN
        self.pc[lanes] += 1

    def exit(self, lanes: Lanes) -> None:
        """End these threads; to leave a barrier's warp mates behind after other work is divergence."""
        if self.first != self.at and (self.state == AT_WARP).any():
            mates = self.index[(self.state == AT_WARP) & np.isin(self.warp, self.warp[lanes])]
            stuck = [i for i in mates if self.program[self.pc[i]].opcode.startswith("bar.")]
            if stuck and "warp" not in self.program[self.pc[stuck[0]]].opcode:
                self.at = int(self.pc[stuck[0]])
                self.fail(
                    np.array(stuck[:1]), None, lambda i: "barrier in divergent code: the rest of the warp went on"
                )
        self.state[lanes] = EXITED

    def register(self, operand: Register) -> Array:
        """The array of a register over all lanes: bits, or bool for predicates."""
        if operand.name in self.special:
            return self.special[operand.name]
        if operand.name[0] == "%" and "@" not in operand.name:
            raise self.unsupported(f"special register {operand.name}")
        if operand.name not in self.registers:
            dtype = np.dtype(DTYPES[operand.type])
            bits = dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")
            self.registers[operand.name] = np.zeros(self.lanes, bits)
        return self.registers[operand.name]

    def reader(self, operand: Operand, type: str) -> Callable[[Lanes], Array]:
        """A function from lanes to the operand's values in the type's dtype."""
        if isinstance(operand, Immediate):
            value = operand.value(type)
            return lambda lanes: value
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise self.unsupported(f"the name {operand.name}")
            address = np.array([self.symbols[operand.name][1] + operand.offset], np.uint64).astype(DTYPES[type])
            return lambda lanes: address
        if isinstance(operand, Not):
            positive = self.reader(operand.predicate, type)
            return lambda lanes: ~positive(lanes)
        if not isinstance(operand, Register):
            raise self.unsupported(f"the operand {operand}")
        array, dtype = self.register(operand), np.dtype(DTYPES[type])
        if (array.dtype.kind == "b") != (dtype.kind == "b") or dtype.itemsize > array.dtype.itemsize:
            raise self.unsupported(f"reading .{operand.type} {operand.name.split('@')[0]} as .{type}")
        if dtype.itemsize < array.dtype.itemsize:
            narrow = np.dtype(f"u{dtype.itemsize}")
            return lambda lanes: array[lanes].astype(narrow).view(dtype)
        view = array.view(dtype)
        return lambda lanes: view[lanes]

    def writer(self, operand: Operand, type: str) -> Callable[[Lanes, Array], None]:
        """A function that stores values of the type's dtype; wider registers are sign- or zero-extended."""
        if operand is None:
            return lambda lanes, value: None
        if not isinstance(operand, Register):
            raise self.unsupported(f"the destination {operand}")
        array, dtype = self.register(operand), np.dtype(DTYPES[type])
        if (array.dtype.kind == "b") != (dtype.kind == "b") or dtype.itemsize > array.dtype.itemsize:
            raise self.unsupported(f"writing .{type} to .{operand.type} {operand.name.split('@')[0]}")
        if dtype.itemsize == array.dtype.itemsize:
            view = array.view(dtype)
        else:
            view = array.view(f"{'i' if dtype.kind == 'i' else 'u'}{array.dtype.itemsize}")
            if dtype.kind == "f":
                bits = np.dtype(f"u{dtype.itemsize}")
                return lambda lanes, value: view.__setitem__(lanes, value.view(bits))
        return view.__setitem__

    def unsupported(self, what: str) -> PTXError:
        instruction = self.program[self.at]
        return PTXError(f"{self.kernel.name}, line {instruction.line}: `{instruction.text}`: {what} is not supported")

    def fail(self, lanes: Lanes | Array, wrong: Array | None, message: Callable[[int], str]) -> None:
        """Raise for the first lane of `lanes` where `wrong`."""
        first = 0 if wrong is None else int(np.flatnonzero(wrong)[0])
        lane = int(self.index[lanes][first])
        instruction = self.program[self.at]
        block, thread = (tuple(int(self.special[f"%{n}.{x}"][lane]) for x in "xyz") for n in ("ctaid", "tid"))
        raise PTXError(
            f"{self.kernel.name}, line {instruction.line}: `{instruction.text}`: "
            f"block {block}, thread {thread}: {message(first)}"
        )


def reachable(module: Module, kernel: Function) -> list[Function]:
    """The kernel and the functions that it calls, callees first."""
    found: list[Function] = []

    def visit(function: Function, path: tuple[str, ...]) -> None:
        for instruction in function.instructions:
            if instruction.opcode.startswith("call"):
                name = next((o.name for o in instruction.operands if isinstance(o, Symbol)), "a pointer")
                if name in path or name not in module.functions:
                    raise PTXError(f"{function.name}, line {instruction.line}: a call of {name} is not supported")
                visit(module.functions[name], (*path, name))
        if function not in found:
            found.append(function)

    visit(kernel, (kernel.name,))
    return found
