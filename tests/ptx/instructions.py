"""Instructions of control, memory, barriers and warps; `bind` turns any instruction into a step over lanes.

A step returns None (go on), the place to jump to, or STOP when it has set its lanes' own places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import arithmetic as fp
from . import machine as run
from .compute import FACTORIES, Modifiers, Step, factory
from .memory import LOCAL_WINDOW, SHARED_WINDOW, WINDOW, Arena, check_atomic, check_read, check_write, rounds
from .parse import DTYPES, SPACES, Address, Instruction, Operand, Pair, Symbol, Vector

if TYPE_CHECKING:
    from .machine import Lanes, Machine

Array = np.ndarray
CONTROL = {"bra", "ret", "exit", "call", "bar", "barrier", "shfl", "vote", "match", "redux", "elect", "trap"}
SCOPES = ("cta", "gpu", "sys", "cluster")
STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio", "sc")
HINTS = ("weak", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L2::64B", "L2::128B", "L2::256B")
HINTS += tuple(
    f"L1::{what}" for what in ("no_allocate", "evict_last", "evict_first", "evict_normal", "evict_unchanged")
)


def bind(m: Machine, instruction: Instruction) -> Step:
    """The step of an instruction, its guard included."""
    mods = Modifiers(m, instruction.opcode)
    if mods.name not in FACTORIES:
        raise m.unsupported(f"the instruction {mods.name}")
    try:
        step = FACTORIES[mods.name](m, instruction.operands, mods)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise m.unsupported(f"this form of {mods.name} ({error!r})") from error
    if mods.left:
        raise m.unsupported(f"the modifier .{mods.left[0]}")
    if instruction.guard is None:
        return step
    register, wanted = instruction.guard
    predicate = m.register(register)
    target = step(slice(0)) if mods.name == "bra" else None
    control = mods.name in CONTROL

    def guarded(lanes: Lanes) -> object:
        taken = predicate[lanes] if wanted else ~predicate[lanes]
        if taken.all():
            return step(lanes)
        if not taken.any():
            return None
        index = m.index[lanes]
        if not control:
            return step(m.compact(index[taken]))
        m.pc[index] = np.where(taken, m.at if target is None else target, m.at + 1)
        return run.STOP

    return guarded


# Control


@factory("bra")
def branch(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    mods.drop("uni")
    function, instruction = m.owner[m.at], m.program[m.at]
    place = function.target(instruction)
    if place is None:
        raise m.unsupported(f"the label {operands[0].name}")
    target = m.start[function.name] + place
    return lambda lanes: target


@factory("ret", "exit")
def leave(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    mods.drop("uni")
    function = m.owner[m.at]
    if function.entry or mods.name == "exit":

        def end(lanes: Lanes) -> object:
            m.exit(lanes)
            return run.STOP

        return end

    def back(lanes: Lanes) -> object:
        index = m.index[lanes]
        places = m.back[function.name][index]
        m.pc[index] = places
        for place in np.unique(places):
            results = (
                next(o for o in m.program[place - 1].operands if isinstance(o, Vector)) if function.returns else ()
            )
            for formal, actual in zip(function.returns, results, strict=True):
                copy_variable(m, index[places == place], formal.name, actual.name, formal.size)
        return run.STOP

    return back


def copy_variable(m: Machine, lanes: Array, source: str, target: str, size: int) -> None:
    """Copy a parameter variable of each thread."""
    rows = lanes[:, None] * m.local.stride
    for array, unit in ((m.local.bytes, 1), (m.local.valid, m.local.granule)):
        places = np.arange(0, size, unit)
        array[(rows + m.local.offsets[target] + places) // unit] = array[
            (rows + m.local.offsets[source] + places) // unit
        ]


@factory("call")
def call(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    mods.drop("uni")
    name = next(o.name for o in operands if isinstance(o, Symbol))
    function = m.module.functions[name]
    arguments = operands[-1] if isinstance(operands[-1], Vector) and len(operands) > 1 else ()

    def step(lanes: Lanes) -> int:
        index = m.index[lanes]
        for formal, actual in zip(function.parameters, arguments, strict=True):
            copy_variable(m, index, actual.name, formal.name, formal.size)
        m.back[name][index] = m.at + 1
        return m.start[name]

    return step


@factory("trap", "brkpt")
def trap(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    return lambda lanes: m.fail(lanes, None, lambda i: "trap: the kernel gave up")


@factory("nanosleep", "membar", "fence", "prefetch", "prefetchu", "griddepcontrol")
def nothing(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    mods.drop(
        *SCOPES, *STRONG, "gl", "global", "L1", "L2", "u32", "proxy", "alias", "async", "wait", "launch_dependents"
    )
    return lambda lanes: None


# Memory


def address_of(m: Machine, operand: Address) -> tuple[Callable[[Lanes], Array], Arena | None]:
    """A reader of an address operand, and the arena if a variable is named."""
    base, offset = operand.base if isinstance(operand.base, Address) else operand
    arena = m.symbols[base.name][0] if isinstance(base, Symbol) and base.name in m.symbols else None
    wide = base.type[-2:] == "64" if hasattr(base, "type") else True
    read = m.reader(base, "u64" if wide else "u32")
    step = np.uint64(offset & (2**64 - 1))

    def address(lanes: Lanes) -> Array:
        value = read(lanes).astype(np.uint64) + step
        return value if len(value) == len(m.index[lanes]) else np.broadcast_to(value, m.index[lanes].shape)

    return address, arena


def spaces(m: Machine, arena: Arena | None, lanes: Lanes, address: Array) -> Iterator[tuple[Arena, Lanes, Array]]:
    """The arena, its lanes, and their addresses in it; a generic access may meet several arenas."""
    if arena is not None:
        yield arena, lanes, address
        return
    for candidate, base in ((m.shared, SHARED_WINDOW), (m.local, LOCAL_WINDOW), (m.memory, None)):
        inside = (
            address - np.uint64(base) < WINDOW
            if base
            else (address < SHARED_WINDOW) | (address >= LOCAL_WINDOW + WINDOW)
        )
        if inside.all():
            yield candidate, lanes, address - np.uint64(base or 0)
            return
        if inside.any():
            yield candidate, m.index[lanes][inside], address[inside] - np.uint64(base or 0)


def place(m: Machine, arena: Arena, lanes: Lanes, address: Array, size: int, write: bool) -> Array:
    copy = m.copy[lanes] if arena is m.shared else m.index[lanes] if arena is m.local else np.zeros(1, np.int64)
    return arena.locate(address, copy, size, write, lambda wrong, text: m.fail(lanes, wrong, text))


def checks_races(m: Machine, arena: Arena, strong: bool) -> bool:
    return m.races and (arena is m.shared or (arena is m.memory and not strong and not m.fenced))


def memory_operands(m: Machine, mods: Modifiers, pointer: Address) -> tuple[Callable, Arena | None, bool]:
    """The address reader, the arena (None: generic) and whether the access is volatile or ordered."""
    space = mods.one_of(*SPACES, "shared::cta", "param::entry", "param::func", default="").split("::")[0]
    read, arena = address_of(m, pointer)
    if space != "param" or arena is None:
        arena = m.arenas[space] if space else None
    strong = len(mods.left) != len(mods.drop(*STRONG))
    mods.drop(*SCOPES, *HINTS)
    return read, arena, strong


@factory("ld", "ldu")
def load(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, constant = mods.type(), mods.flag("nc")
    count = int(mods.one_of("v2", "v4", default="v1")[1:])
    read_address, space, strong = memory_operands(m, mods, operands[1])
    targets = operands[0] if isinstance(operands[0], Vector) else (operands[0],)
    item = np.dtype(DTYPES[type]).itemsize
    size, dtype = item * count, DTYPES[type]
    writers = [m.writer(register, type) for register in targets]
    if len(writers) != count:
        raise m.unsupported(f"a vector of {len(writers)} registers")

    def step(lanes: Lanes) -> None:
        for arena, at, address in spaces(m, space, lanes, read_address(lanes)):
            position = place(m, arena, at, address, size, False)
            if arena is not m.parameters:
                check_read(
                    arena, m.order, position, size, m.thread[at], lambda wrong, text, at=at: m.fail(at, wrong, text),
                    checks_races(m, arena, strong) and not constant, constant,
                )  # fmt: skip
                m.report.read[arena.name] += size * len(position)
            first = position // item
            for i, write in enumerate(writers):
                write(at, arena.views[item][first + i].view(dtype))

    return step


@factory("st")
def store(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    count = int(mods.one_of("v2", "v4", default="v1")[1:])
    read_address, space, strong = memory_operands(m, mods, operands[0])
    sources = operands[1] if isinstance(operands[1], Vector) else (operands[1],)
    item = np.dtype(DTYPES[type]).itemsize
    size, raw = item * count, f"u{8 * item}"
    readers = [m.reader(register, raw if type[0] != "f" else type) for register in sources]
    if len(readers) != count:
        raise m.unsupported(f"a vector of {len(readers)} registers")

    def step(lanes: Lanes) -> None:
        for arena, at, address in spaces(m, space, lanes, read_address(lanes)):
            position = place(m, arena, at, address, size, True)
            view, first = arena.views[item], position // item
            values = [np.broadcast_to(read(at).view(view.dtype), position.shape) for read in readers]
            if arena is not m.local:
                same = np.all([view[first + i] == value for i, value in enumerate(values)], axis=0)
                check_write(
                    arena, m.order, position, size, m.thread[at], lambda wrong, text, at=at: m.fail(at, wrong, text),
                    checks_races(m, arena, strong), same,
                )  # fmt: skip
            for i, value in enumerate(values):
                view[first + i] = value
                if arena is not m.local and (lost := view[first + i] != value).any():
                    m.fail(at, lost, lambda j: "race: another thread writes another value here by the same instruction")
            arena.valid[arena.spread(position, size)] = True
            m.report.written[arena.name] += size * len(position)

    return step


UPDATES: dict[str, Callable] = {
    "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, b: b,
    "min": lambda old, b: fp.extreme(old, b, False, False), "max": lambda old, b: fp.extreme(old, b, True, False),
    "cas": lambda old, b, c: np.where(old == b, c, old),
    "inc": lambda old, b: np.where(old >= b, 0, old + 1).astype(old.dtype),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype),
}  # fmt: skip


@factory("atom", "red")
def atomic(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    """Read, change, write; threads that meet at an address come in a random order."""
    type = mods.type()
    if mods.name == "red":
        operands = (None, *operands)
    update = UPDATES[mods.one_of(*UPDATES)]
    mods.flag("noftz")
    read_address, space, _ = memory_operands(m, mods, operands[1])
    dtype = np.dtype(DTYPES[type])
    if "f16" in type:
        raise m.unsupported("an atomic on halves")
    readers, write = [m.reader(operand, type) for operand in operands[2:]], m.writer(operands[0], type)

    def step(lanes: Lanes) -> None:
        for arena, at, address in spaces(m, space, lanes, read_address(lanes)):
            position = place(m, arena, at, address, dtype.itemsize, True)
            check_atomic(
                arena, m.order, position, dtype.itemsize, m.thread[at],
                lambda wrong, text, at=at: m.fail(at, wrong, text), checks_races(m, arena, False),
            )  # fmt: skip
            values = [np.broadcast_to(read(at), position.shape) for read in readers]
            old, view = np.empty(len(position), dtype), arena.views[dtype.itemsize].view(dtype)
            for group in rounds(position, m.rng):
                where = position[group] // dtype.itemsize
                old[group] = view[where]
                new = update(old[group], *[value[group] for value in values])
                view[where] = fp.flush(new) if type == "f32" and arena is m.memory else new
            write(at, old)
            m.report.read[arena.name] += dtype.itemsize * len(position)
            m.report.written[arena.name] += dtype.itemsize * len(position)

    return step


class Copy(NamedTuple):
    """A cp.async in flight: its lanes, their group, and the bytes to land at places in shared memory."""

    lanes: Array
    group: Array
    position: Array
    data: Array


@factory("cp")
def copy_asynchronously(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    if not mods.flag("async"):
        raise m.unsupported("cp without .async")
    if mods.flag("commit_group"):
        return lambda lanes: m.copy_group.__setitem__(lanes, m.copy_group[lanes] + 1)
    if mods.flag("wait_all"):
        return lambda lanes: land(m, lanes, None)
    if mods.flag("wait_group"):
        keep = int(operands[0].value("u32")[0])
        return lambda lanes: land(m, lanes, keep)
    whole_line = mods.one_of("ca", "cg") == "cg"
    mods.drop("shared", "shared::cta", "global", *HINTS)
    size = int(operands[2].value("u32")[0])
    if size != 16 and (whole_line or size not in (4, 8)):
        raise m.unsupported(f"a copy of {size} bytes")
    read_target, read_source = address_of(m, operands[0])[0], address_of(m, operands[1])[0]
    read_count = m.reader(operands[3] if len(operands) > 3 else operands[2], "u32")

    def step(lanes: Lanes) -> None:
        index = m.index[lanes]
        fail = lambda wrong, text: m.fail(lanes, wrong, text)  # noqa: E731
        target = place(m, m.shared, lanes, read_target(lanes), size, True)
        source, count = read_source(lanes), np.broadcast_to(read_count(lanes), index.shape)
        if (wrong := count > size).any():
            fail(wrong, lambda i: f"the source size {count[i]} is more than {size} bytes")
        if (wrong := source & np.uint64(size - 1) != 0).any():
            fail(wrong, lambda i: f"{size}-byte access to {m.memory.where(source[i])} is misaligned")
        data = np.zeros((len(index), size), np.uint8)
        unit = size if (count == size).all() else m.memory.granule
        for offset in range(0, size, unit):
            some = count > offset
            if not some.any():
                continue
            at = index[some]
            position = place(m, m.memory, at, source[some] + np.uint64(offset), unit, False)
            check_read(
                m.memory, m.order, position, unit, m.thread[at], lambda wrong, text, at=at: m.fail(at, wrong, text),
                checks_races(m, m.memory, False), False,
            )  # fmt: skip
            data[np.flatnonzero(some)[:, None], offset + np.arange(unit)] = m.memory.bytes[
                position[:, None] + np.arange(unit)
            ]
        data[np.arange(size) >= count[:, None]] = 0
        check_write(m.shared, m.order, target, size, m.thread[lanes], fail, m.races, np.zeros(len(index), bool))
        m.shared.valid[m.shared.spread(target, size)] = False
        m.shared.bytes[target[:, None] + np.arange(size)] = 0xFF
        m.pending.append(Copy(index, m.copy_group[index], target, data))
        m.report.read["global"] += int(count.sum())
        m.report.written["shared"] += data.size

    return step


def land(m: Machine, lanes: Lanes, keep: int | None) -> None:
    """Finish these lanes' copies: all, or those of all committed groups but the last `keep`."""
    waiting = np.zeros(m.lanes, bool)
    waiting[lanes] = True
    left = []
    for copy in m.pending:
        done = waiting[copy.lanes]
        if keep is not None:
            done &= copy.group < m.copy_group[copy.lanes] - keep
        if done.any():
            position, size = copy.position[done], copy.data.shape[1]
            m.shared.bytes[position[:, None] + np.arange(size)] = copy.data[done]
            granules = m.shared.spread(position, size)
            m.shared.valid[granules] = True
            m.shared.writer[granules] = m.thread[copy.lanes[done]][:, None]
            m.shared.written[granules] = m.order.now
        if not done.all():
            left.append(Copy(*[part[~done] for part in copy]))
    m.pending = left


@factory("cvta")
def convert_address(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    """Generic addresses of shared and local memory lie in windows; those of global and const are themselves."""
    mods.type()
    back, space = mods.flag("to"), mods.one_of("global", "shared", "local", "const", "param", "shared::cta")
    window = np.uint64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space.split("::")[0], 0))
    read, write = m.reader(operands[1], "u64"), m.writer(operands[0], "u64")
    return lambda lanes: write(lanes, read(lanes) - window if back else read(lanes) + window)


@factory("isspacep")
def is_space(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    space = mods.one_of("global", "shared", "local", "shared::cta").split("::")[0]
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space)
    read, write = m.reader(operands[1], "u64"), m.writer(operands[0], "pred")
    return lambda lanes: write(
        lanes, read(lanes) - np.uint64(window) < WINDOW if window else read(lanes) >= LOCAL_WINDOW + WINDOW
    )


# Barriers


@factory("bar", "barrier")
def barrier(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    if mods.flag("warp"):
        mods.flag("sync")

        def ordered(lanes: Lanes, masks: Array) -> None:
            m.order.warp_time[m.thread[lanes] >> 5] = m.order.now

        return together(m, operands[0], ordered)
    mods.drop("cta")
    aligned = mods.flag("aligned") or mods.name == "bar"
    kind = mods.one_of("sync", "red", "arrive")
    result = predicate = None
    if kind == "red":
        how, type = mods.one_of("popc", "and", "or"), mods.type()
        result, predicate, operands = m.writer(operands[0], type), m.reader(operands[-1], "pred"), operands[1:-1]
        m.finish[m.at] = result, how
    number = m.reader(operands[0], "u32")
    expected = m.reader(operands[1], "u32") if len(operands) > 1 else None

    def step(lanes: Lanes) -> object:
        ready = m.arrive(lanes, None) if aligned else lanes
        if ready is None:
            return run.STOP
        m.barrier[ready] = number(ready)
        if (wrong := m.barrier[ready] > 15).any():
            m.fail(ready, wrong, lambda i: "barriers are numbered from 0 to 15")
        m.expected[ready] = expected(ready) if expected else 0
        if kind == "arrive":
            np.add.at(m.arrived, (m.copy[ready], m.barrier[ready]), 1)
            m.pc[ready] = m.at + 1
            return None if ready is lanes else run.STOP
        if predicate:
            m.vote[ready] = predicate(ready)
        m.pc[ready] = m.at
        m.state[ready] = run.AT_BARRIER
        return run.STOP

    return step


def finish_barrier(m: Machine, lanes: Array, everyone: Array) -> None:
    """Give bar.red's result to lanes at one instruction, of all the threads that the barrier let go."""
    if m.at not in m.finish:
        return
    write, how = m.finish[m.at]
    key = m.copy * 16 + m.barrier
    votes, total = (np.bincount(key[everyone], weights)[key[lanes]] for weights in (m.vote[everyone], None))
    write(lanes, {"popc": votes.astype(np.uint32), "and": votes == total, "or": votes > 0}[how])


# Warps


def together(m: Machine, mask: Operand, body: Callable[[Lanes, Array], None]) -> Step:
    """Run the body on lanes whose masks' lanes have all come."""
    read = m.reader(mask, "u32")

    def step(lanes: Lanes) -> object:
        masks = np.broadcast_to(read(slice(None)), (m.lanes,))
        ready = m.arrive(lanes, masks)
        if ready is None:
            return run.STOP
        body(ready, masks[ready])
        if ready is lanes:
            return None
        m.pc[ready] = m.at + 1
        return run.STOP

    return step


def teams(m: Machine, lanes: Lanes, masks: Array) -> tuple[Array, int]:
    """A number for each lane, the same for lanes of one warp with one mask, and how many there are."""
    key = (m.warp[lanes] << 32) | masks
    names, number = np.unique(key, return_inverse=True)
    return number, len(names)


@factory("shfl")
def shuffle(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    mods.type(), mods.flag("sync")
    kind = mods.one_of("up", "down", "bfly", "idx")
    first, second = operands[0] if isinstance(operands[0], Pair) else (operands[0], None)
    write, write_second = m.writer(first, "u32"), m.writer(second, "pred")
    value, amount, bounds = (m.reader(operand, "u32") for operand in operands[1:4])

    def body(lanes: Lanes, masks: Array) -> None:
        lane, b, c = (x.astype(np.int64) for x in (m.lane[lanes], amount(lanes) & 31, bounds(lanes)))
        clamp, segment = c & 31, c >> 8 & 31
        last = (lane & segment) | (clamp & ~segment)
        other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": (lane & segment) | (b & ~segment)}[kind]
        inside = other >= last if kind == "up" else other <= last
        other = np.where(inside, other, lane)
        source = m.index[lanes] - lane + other
        named = masks >> other.astype(np.uint32) & 1 != 0
        if (wrong := ~named | (m.state[source] == run.EXITED)).any():
            m.fail(
                lanes,
                wrong,
                lambda i: f"takes the value of lane {other[i]}, which is not there (exited, or masked out)",
            )
        everyone = np.broadcast_to(value(slice(None)), (m.lanes,))
        write(lanes, everyone[source])
        write_second(lanes, inside)

    return together(m, operands[4], body)


@factory("vote")
def vote(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, kind = mods.type(), mods.one_of("ballot", "any", "all", "uni")
    mods.flag("sync")
    read, write = m.reader(operands[1], "pred"), m.writer(operands[0], type)

    def body(lanes: Lanes, masks: Array) -> None:
        team, count = teams(m, lanes, masks)
        yes = np.broadcast_to(read(lanes), team.shape)
        votes, total = np.bincount(team, yes, count)[team], np.bincount(team, None, count)[team]
        if kind == "ballot":
            bits = np.bincount(team, np.where(yes, 2.0 ** m.lane[lanes], 0), count)
            write(lanes, bits.astype(np.uint32)[team])
        else:
            write(lanes, {"any": votes > 0, "all": votes == total, "uni": (votes == 0) | (votes == total)}[kind])

    return together(m, operands[2], body)


@factory("match")
def match(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, kind = mods.type(), mods.one_of("any", "all")
    mods.flag("sync")
    first, second = operands[0] if isinstance(operands[0], Pair) else (operands[0], None)
    read, write, write_second = m.reader(operands[1], type), m.writer(first, "u32"), m.writer(second, "pred")

    def body(lanes: Lanes, masks: Array) -> None:
        team, count = teams(m, lanes, masks)
        names, value = np.unique(np.broadcast_to(read(lanes), team.shape), return_inverse=True)
        same = team * len(names) + value
        bits = np.bincount(same, 2.0 ** m.lane[lanes])[same].astype(np.uint32)
        unanimous = np.bincount(same)[same] == np.bincount(team, None, count)[team]
        write(lanes, bits if kind == "any" else np.where(unanimous, bits, np.uint32(0)))
        write_second(lanes, unanimous)

    return together(m, operands[2], body)


@factory("redux")
def reduce(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, name = mods.type(), mods.one_of("add", "min", "max", "and", "or", "xor")
    mods.flag("sync")
    read, write, dtype = m.reader(operands[1], type), m.writer(operands[0], type), DTYPES[type]
    names = {"min": np.minimum, "max": np.maximum}
    function = names[name] if name in names else UPDATES[name]

    def body(lanes: Lanes, masks: Array) -> None:
        team, count = teams(m, lanes, masks)
        value = np.broadcast_to(read(lanes), team.shape)
        result = np.zeros(count, dtype)
        result[team] = value  # a member of each, for min, max, and, or
        if name in ("add", "xor"):
            result.fill(0)
        function.at(result, team, value)
        write(lanes, result[team])

    return together(m, operands[2], body)


@factory("activemask")
def active_mask(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    mods.type()
    write = m.writer(operands[0], "u32")

    def step(lanes: Lanes) -> None:
        warp = m.warp[lanes]
        write(lanes, np.bincount(warp, 2.0 ** m.lane[lanes])[warp].astype(np.uint32))

    return step
