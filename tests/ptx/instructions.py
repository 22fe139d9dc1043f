"""Instructions of control, memory, barriers and warps; `bind` turns any instruction into a step
over lanes.

A step returns None (go on), the place to jump to, or STOP when it has set its lanes' own places.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import arithmetic as fp
from . import compute
from . import machine as run
from .compute import Step
from .memory import Arena
from .parse import DTYPES, Address, Immediate, Instruction, Operand, Register, Vector

if TYPE_CHECKING:
    from .machine import Lanes, Machine

Array = np.ndarray
HINTS = r"\.L1::no_allocate\.L2::256B"
MEMORY = re.compile(
    rf"((?:ld\.global(?:\.nc(?:{HINTS})?)?)|ld\.shared|ld\.param|st\.global|st\.shared)(?:\.v([24]))?\.([busf]\d+)"
)
LDMATRIX = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
ADD = re.compile(r"atom(?:\.relaxed\.gpu)?\.(global|shared)\.add\.(f32|u32)")  # what atom means


def bind(m: Machine, instruction: Instruction) -> Step:
    """The step of an instruction, its guard included."""
    opcode, operands = instruction.opcode, instruction.operands
    try:
        if instruction.guard:
            return branch(m, opcode, operands, instruction.guard)
        family = FAMILIES.get(opcode.split(".")[0], compute.bind)
        return family(m, opcode, operands)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise m.unsupported(f"this form of {opcode} ({error!r})") from error


# Control


def branch(
    m: Machine,
    opcode: str,
    operands: tuple[Operand, ...],
    guard: tuple[Register, bool] | None = None,
) -> Step:
    """The only instruction that may be guarded."""
    if opcode not in ("bra", "bra.uni"):
        raise m.unsupported(f"a guard, or the instruction {opcode},")
    target = m.kernel.labels[operands[0].name]
    if guard is None:
        return lambda lanes: target
    predicate, wanted = m.view(guard[0], "pred"), guard[1]

    def step(lanes: Lanes) -> object:
        taken = predicate[lanes] == wanted
        if taken.all():
            return target
        if not taken.any():
            return None
        m.pc[lanes] = np.where(taken, target, m.at + 1)
        return run.STOP

    return step


def leave(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    def step(lanes: Lanes) -> object:
        m.exit(lanes)
        return run.STOP

    return step


def reach(
    m: Machine, operand: Address, arena: Arena, size: int, write: bool
) -> Callable[[Lanes], Array]:
    """From lanes to the positions of their accesses of `size` bytes at an address operand, checked
    and counted."""
    type = "u32" if isinstance(operand.base, Register) and operand.base.type == "b32" else "u64"
    read, offset = m.reader(operand.base, type), np.uint64(operand.offset & (2**64 - 1))
    within = np.uint64(2 ** int(type[1:]) - 1)  # the sum wraps around in the register's width

    def positions(lanes: Lanes) -> Array:
        address = (read(lanes).astype(np.uint64) + offset) & within
        address = np.broadcast_to(address, m.index[lanes].shape)
        position = arena.locate(address, m.copy[lanes] if arena is m.shared else 0, size, write)
        m.count(arena, lanes, position, size, write)
        return position

    return positions


def access(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """ld and st."""
    match = MEMORY.fullmatch(opcode)
    if not match:
        raise m.unsupported(f"the instruction {opcode}")
    name, space, *modifiers = match[1].split(".")
    pointer, data = operands if name == "st" else operands[::-1]
    registers = data if isinstance(data, Vector) else (data,)
    if len(registers) != int(match[2] or 1):
        raise m.unsupported(f"a vector of {len(registers)} registers")
    if space == "param":
        wider = held(data, match[3])
        write = m.writer(data, wider)

        def value() -> Array:
            given = m.parameters[pointer.base.name]
            return np.frombuffer(given, DTYPES[match[3]], 1, pointer.offset).astype(DTYPES[wider])

        value()  # raises where there is no such parameter
        return lambda lanes: write(lanes, value())
    if name == "st":
        return store(m, m.arenas[space], pointer, registers, match[3])
    return load(m, m.arenas[space], pointer, registers, match[3], "nc" in modifiers)


def held(register: Operand, type: str) -> str:
    """The type of an access's data in a register: integers are extended to a wider one."""
    if not isinstance(register, Register) or type[0] == "f" or register.type == "special":
        return type
    return type[0] + str(max(int(type[1:]), int(register.type[1:])))


def load(
    m: Machine, arena: Arena, pointer: Address, registers: tuple, type: str, constant: bool
) -> Step:
    item = np.dtype(DTYPES[type]).itemsize
    size = item * len(registers)
    positions = reach(m, pointer, arena, size, False)
    wider = [DTYPES[held(register, type)] for register in registers]
    writers = [m.writer(register, held(register, type)) for register in registers]

    def step(lanes: Lanes) -> None:
        position, view = positions(lanes), arena.views[item].view(DTYPES[type])
        arena.check_read(position, size, m.thread[lanes], constant)
        for i, (write, dtype) in enumerate(zip(writers, wider, strict=True)):
            write(lanes, view[position // item + i].astype(dtype))

    return step


def store(m: Machine, arena: Arena, pointer: Address, registers: tuple, type: str) -> Step:
    item = np.dtype(DTYPES[type]).itemsize
    size = item * len(registers)
    positions = reach(m, pointer, arena, size, True)
    readers = [m.reader(register, held(register, type)) for register in registers]

    def step(lanes: Lanes) -> None:
        position, view = positions(lanes), arena.views[item]
        first = position // item
        values = [read(lanes).astype(DTYPES[type]).view(view.dtype) for read in readers]
        same = np.all([view[first + i] == value for i, value in enumerate(values)], axis=0)
        arena.check_write(position, size, m.thread[lanes], same)
        for i, value in enumerate(values):
            view[first + i] = value
            if (lost := view[first + i] != value).any():
                m.fail(
                    lost, "race: another thread writes another value here by the same instruction"
                )
        arena.valid[arena.spread(position, size)] = True

    return step


def atomic(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """Read, add, write; threads that meet at an address come in a random order. In f32 global
    memory flushes."""
    match = ADD.fullmatch(opcode)
    if not match:
        raise m.unsupported(f"the instruction {opcode}")
    arena, type = m.arenas[match[1]], match[2]
    flush = fp.flush if (arena, type) == (m.memory, "f32") else lambda x: x
    positions, read = reach(m, operands[1], arena, 4, True), m.reader(operands[2], type)
    write = m.writer(operands[0], type)

    def step(lanes: Lanes) -> None:
        position, view = positions(lanes), arena.views[4].view(DTYPES[type])
        arena.check_valid(position, 4)
        arena.check_write(position, 4, m.thread[lanes], atomic=True)
        added, old = (
            np.broadcast_to(read(lanes), position.shape),
            np.empty(position.shape, DTYPES[type]),
        )
        for i in m.rng.permutation(len(position)):
            old[i] = view[position[i] // 4]
            view[position[i] // 4] = flush(old[i] + added[i])
        write(lanes, old)

    return step


class Copy(NamedTuple):
    """A cp.async in flight: its lanes, their group, and the bytes to land at places in shared
    memory."""

    lanes: Array
    group: Array
    position: Array
    data: Array


def copy_asynchronously(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """16 bytes a lane, or 16 zeros where the size of the source is 0."""
    if opcode == "cp.async.commit_group":
        return lambda lanes: m.copy_group.__setitem__(lanes, m.copy_group[lanes] + 1)
    if opcode == "cp.async.wait_group":
        keep = int(operands[0].value("u32")[0])
        return lambda lanes: land(m, lanes, keep)
    plain = opcode.replace(".L2::128B", "").replace(".shared::cta", ".shared")
    if plain != "cp.async.cg.shared.global" or operands[2].value("u32") != 16:
        raise m.unsupported(f"this form of {opcode}")
    targets, sources = (
        reach(m, operands[0], m.shared, 16, True),
        reach(m, operands[1], m.memory, 16, False),
    )
    size = m.reader(operands[3] if len(operands) == 4 else operands[2], "u32")

    def step(lanes: Lanes) -> None:
        target, sizes = targets(lanes), np.broadcast_to(size(lanes), m.index[lanes].shape)
        if (wrong := (sizes != 0) & (sizes != 16)).any():
            m.fail(wrong, lambda i: f"a source of {sizes[i]} bytes, not 0 or 16, is not supported")
        data = np.zeros((len(target), 16), np.uint8)
        if sizes.any():  # of 0 bytes nothing is read, wherever the address points
            some = m.running = m.index[lanes][sizes == 16]
            source = sources(some)
            m.memory.check_read(source, 16, m.thread[some], False)
            data[sizes == 16] = m.memory.bytes[source[:, None] + np.arange(16)]
            m.running = lanes
        m.shared.check_write(target, 16, m.thread[lanes])
        place, granules = target[:, None] + np.arange(16), m.shared.spread(target, 16)
        m.shared.bytes[place] = data
        if (lost := (m.shared.bytes[place] != data).any(1)).any():
            m.fail(lost, "race: another thread copies other bytes here by the same instruction")
        m.shared.bytes[place] = 0xFF
        m.shared.valid[granules] = False
        m.shared.flying[granules] = True
        m.pending.append(Copy(m.index[lanes], m.copy_group[lanes].copy(), target, data))

    return step


def land(m: Machine, lanes: Lanes, keep: int) -> None:
    """Finish these lanes' copies of all committed groups but the last `keep`."""
    waiting = np.zeros(m.lanes, bool)
    waiting[lanes] = True
    left = []
    for copy in m.pending:
        done = waiting[copy.lanes] & (copy.group < m.copy_group[copy.lanes] - keep)
        if done.any():
            position = copy.position[done]
            m.shared.bytes[position[:, None] + np.arange(16)] = copy.data[done]
            granules = m.shared.spread(position, 16)
            m.shared.valid[granules] = True
            m.shared.flying[granules] = False
            m.shared.note(m.shared.writes, granules, m.thread[copy.lanes[done]][:, None])
        if not done.all():
            left.append(Copy(*[part[~done] for part in copy]))
    m.pending = left


# Barriers and warps


def barrier(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """bar.sync 0 of all threads of the block, and bar.warp.sync of all of the warp."""
    if opcode == "bar.warp.sync":

        def ordered(lanes: Lanes) -> None:
            m.order.warp_time[m.thread[lanes] >> 5] = m.order.now

        return together(m, operands[0], ordered)
    if opcode != "bar.sync" or len(operands) != 1 or operands[0].value("u32") != 0:
        raise m.unsupported(f"this form of {opcode}")

    def step(lanes: Lanes) -> object:
        ready = m.arrive(lanes)
        if ready is not None:
            m.pc[ready] = m.at
            m.state[ready] = run.AT_BARRIER
        return run.STOP

    return step


def together(m: Machine, mask: Operand, body: Callable[[Lanes], None]) -> Step:
    """Run the body on lanes whose whole warp has come."""
    read = m.reader(mask, "u32")

    def step(lanes: Lanes) -> object:
        masks = np.broadcast_to(read(lanes), m.index[lanes].shape)
        if (wrong := masks != 0xFFFFFFFF).any():
            m.fail(
                wrong,
                lambda i: f"the member mask {masks[i]:#x}, of less than a warp, is not supported",
            )
        ready = m.arrive(lanes)
        if ready is None:
            return run.STOP
        m.running = ready
        body(ready)
        if ready is lanes:
            return None
        m.pc[ready] = m.at + 1
        return run.STOP

    return step


def shuffle(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """shfl.sync.up, .bfly and .idx: see PTX ISA for the operands."""
    kind = opcode.removeprefix("shfl.sync.").removesuffix(".b32")
    if kind not in ("up", "bfly", "idx"):
        raise m.unsupported(f"the instruction {opcode}")
    write, write_inside = (
        m.writer(part, type) for part, type in zip(operands[0], ("u32", "pred"), strict=True)
    )
    value, amount, bounds = (m.reader(operand, "u32") for operand in operands[1:4])

    def body(lanes: Lanes) -> None:
        lane = m.lane[lanes]
        b = amount(lanes).astype(np.int64) & 31
        c = bounds(lanes).astype(np.int64)
        clamp, segment = c & 31, c >> 8 & 31
        last = (lane & segment) | (clamp & ~segment)
        other = {"up": lane - b, "bfly": lane ^ b, "idx": (lane & segment) | (b & ~segment)}[kind]
        inside = other >= last if kind == "up" else other <= last
        other = np.where(inside, other, lane)
        source = m.index[lanes] - lane + other
        if (wrong := m.state[source] == run.EXITED).any():
            m.fail(
                wrong,
                lambda i: f"takes the value of lane {other[i]}, which is not there (it has exited)",
            )
        everyone = np.broadcast_to(value(slice(None)), (m.lanes,))
        write(lanes, everyone[source])
        write_inside(lanes, inside)

    return together(m, operands[4], body)


def reduce(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """redux.sync: the largest, or the smallest, integer of a warp's lanes that have not exited, in
    all of these."""
    kinds = {
        "redux.sync.max.u32": ("u32", np.maximum, 0),
        "redux.sync.min.s32": ("s32", np.minimum, 2**31 - 1),
    }
    if opcode not in kinds:
        raise m.unsupported(f"the instruction {opcode}")
    type, combine, least = kinds[opcode]
    write, read = m.writer(operands[0], type), m.reader(operands[1], type)

    def body(lanes: Lanes) -> None:
        values = np.where(m.state == run.EXITED, DTYPES[type](least), read(slice(None)))
        first = m.index[lanes] - m.lane[lanes]
        write(lanes, combine.reduce(values[first[:, None] + np.arange(32)], axis=1))

    return together(m, operands[2], body)


# Matrices: a warp's 32 lanes hold them together. Of 8 × 8 numbers of 16 bits, lane i holds row
# i // 4 and in it the columns 2 (i % 4), in the lower half of a register, and 2 (i % 4) + 1.


def aligned(m: Machine, body: Callable[[Lanes, Array], None]) -> Step:
    """Run the body on warps that have come whole; it gets the lanes, and their numbers [warps,
    32]."""

    def whole(lanes: Lanes) -> None:
        index = m.index[lanes]
        here = np.bincount(m.warp[index], minlength=m.lanes // 32)[m.warp[index]]
        if (wrong := here != 32).any():
            m.fail(wrong, "lanes missing: all 32 of a warp must execute this together")
        body(lanes, index.reshape(-1, 32))

    return together(m, Immediate("-1"), whole)


def load_matrices(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """ldmatrix: lane i gives the address of row i % 8 of matrix i // 8, and register j of all lanes
    gets matrix j. A lane reads what it gets, so what another lane has written must be ordered."""
    match = LDMATRIX.fullmatch(opcode)
    if not match or len(operands[0]) != int(match[1]):
        raise m.unsupported(f"this form of {opcode}")
    count = int(match[1])
    positions = reach(m, operands[1], m.shared, 16, False)
    writers = [m.writer(register, "u32") for register in operands[0]]
    size = 2 if match[2] else 4  # of the part of a row that a lane gets: a number, or a pair
    lane = np.arange(32).reshape(8, 4)  # by row (of the transposed: column) and pair
    takers = np.tile(lane.T.repeat(2, axis=0) if match[2] else lane, (count, 1))

    def body(lanes: Lanes, warps: Array) -> None:
        rows = m.running = warps[:, : 8 * count].ravel()
        position = positions(rows)
        readers = m.running = (warps[:, 0, None, None] + takers).ravel()
        parts = (position[:, None] + np.arange(0, 16, size)).ravel()
        m.shared.check_read(parts, size, m.thread[readers], False)
        m.running = lanes
        found = m.shared.bytes[position[:, None] + np.arange(16)].view(np.uint16)
        matrices = found.reshape(-1, count, 8, 8)
        if match[2]:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        words = matrices.reshape(-1, count, 64).view(np.uint32)
        for j, write in enumerate(writers):
            write(lanes, words[:, j].ravel())

    return aligned(m, body)


def multiply_matrices(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """mma.sync: d = a b + c, a 16 × 16 and b 16 × 8 in bfloat16, c and d in float32.

    Each sum is taken in float64 and rounded once. Hardware aligns the products of a sum and
    truncates them, and its order is not documented: there the last places may differ.
    """
    if opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        raise m.unsupported(f"this form of {opcode}")
    d, a, b, c = operands
    writers = [m.writer(register, "f32") for register in d]
    read_a, read_b = ([m.reader(register, "u32") for register in part] for part in (a, b))
    read_c = [m.reader(register, "f32") for register in c]

    def numbers(lanes: Lanes, read: Callable[[Lanes], Array]) -> Array:
        """The 8 × 8 numbers of a register, [warps, 8, 8]."""
        halves = np.ascontiguousarray(read(lanes)).view(np.uint16).astype(np.uint32) << 16
        return halves.view(np.float32).reshape(-1, 8, 8)

    def body(lanes: Lanes, warps: Array) -> None:
        count = len(warps)
        left = np.empty((count, 16, 16))
        for j, read in enumerate(read_a):  # upper left, lower left, upper right, lower right
            left[:, j % 2 * 8 :, j // 2 * 8 :][:, :8, :8] = numbers(lanes, read)
        right = np.empty((count, 8, 16))  # bᵀ: a register's pairs lie along columns of b
        for j, read in enumerate(read_b):
            right[:, :, j * 8 : j * 8 + 8] = numbers(lanes, read)
        added = np.stack(
            [np.broadcast_to(read(lanes), (32 * count,)).reshape(count, 8, 4) for read in read_c]
        )  # [register, warp, row, pair]: registers 0, 1 in the upper half, 2, 3 in the lower one
        total = (left @ right.swapaxes(1, 2)).reshape(count, 2, 8, 4, 2)
        for j, write in enumerate(writers):
            write(lanes, (total[:, j // 2, :, :, j % 2] + added[j]).astype(np.float32).ravel())

    return aligned(m, body)


FAMILIES: dict[str, Callable[[Machine, str, tuple[Operand, ...]], Step]] = {
    "bra": branch,
    "ret": leave,
    "ld": access,
    "st": access,
    "atom": atomic,
    "cp": copy_asynchronously,
    "bar": barrier,
    "shfl": shuffle,
    "redux": reduce,
    "ldmatrix": load_matrices,
    "mma": multiply_matrices,
}
