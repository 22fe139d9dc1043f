"""From our names to a port's: which of its tensors, or pieces of them, hold one of ours.

A layout is a table in TOML, ours = theirs. ``layouts.toml`` has those that are known without being
asked for; ``--map FILE`` has any other, and comes first. On the left stands our name of a parameter
(then its gradient is meant) or of any tensor with its prefix, as in act/model.norm; {L} stands for
the layer, {E} for the expert. On the right stands a name of theirs, or a table, or a list of either
of which the first that is there counts:

    theirs          the name, with the same placeholders, {M} (the MTP module, from 0) and {R} (the
                    rank); FILE:NAME where several files have one name. Without a prefix of its own
                    it may stand with ours or without
    ranks           how many ranks hold a piece each, or their numbers in order
    split           the axis, after ``transpose``, along which the pieces are put together; 0
    local_experts   how many experts a rank holds: then {R} and {E} are the expert's rank and its
                    number there, and nothing is put together
    index           "{E}": the expert's slice of the first axis
    transpose       true: the last two axes change places
    part            [i, n]: only the i-th of n equal parts of the first axis, from 0, as in [1, 2]
                    for up of a tensor that holds gate above up; of each rank
    rotated         "halves": the rotated rows of a head, or of the shared key, lie in halves, as in
                    code that rotates x[:R/2] with x[R/2:]; ours lie in pairs

They are done in this order: index, transpose, part, ranks, rotated.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.names import layer_of
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..files import read_text
from ..parameters import EXPERTS, attention_shapes, depth_of, layer_name
from .theirs import Tensor, Theirs

__all__ = ["PREFIXES", "Alternative", "Found", "Layout", "find", "known_layout", "read_layout"]

PREFIXES = ("in", "aux", "act", "out", "cot", "grad")  # of tensors, before a slash
PLACEHOLDERS = {"L", "E", "M", "R"}
KEYS = {"theirs", "ranks", "split", "local_experts", "index", "transpose", "part", "rotated"}
MOST_RANKS = 4096


class Alternative(NamedTuple):
    """One way in which a port may hold a tensor of ours."""

    theirs: str
    ranks: tuple[int, ...] = ()
    split: int = 0
    local_experts: int = 0
    of_expert: bool = False  # its slice of the first axis
    transpose: bool = False
    part: tuple[int, int] = (0, 1)
    rotated: bool = False


Layout = Mapping[str, tuple[Alternative, ...]]  # by our name, with its prefix and {L}, {E}


class Found(NamedTuple):
    """The pieces that make up one of our tensors."""

    keys: tuple[str, ...]  # theirs, in the order in which they are put together
    pieces: tuple[Tensor, ...]
    alternative: Alternative
    expert: int
    rotated: tuple[int, int] | None  # rows of a head, and how many of the last are rotated

    @property
    def dtype(self) -> str:
        return self.pieces[0].dtype

    @property
    def path(self) -> Path:
        return self.pieces[0].path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `array` gives; ValueError if the pieces can't be put together."""
        return self._join(
            [np.broadcast_to(np.uint8(0), piece.shape) for piece in self.pieces]
        ).shape

    def array(self) -> np.ndarray:
        """The tensor as ours lies; a view of the file where it can be."""
        return self._join([piece.array() for piece in self.pieces])

    def _join(self, arrays: list[np.ndarray]) -> np.ndarray:
        how, parts = self.alternative, []
        for x in arrays:
            if how.of_expert:
                if x.ndim == 0 or self.expert >= x.shape[0]:
                    raise ValueError(f"has no expert {self.expert}, its shape is {x.shape}")
                x = x[self.expert]
            if how.transpose:
                x = np.swapaxes(x, -1, -2) if x.ndim > 1 else x
            number, count = how.part
            if count > 1:
                if x.ndim == 0 or x.shape[0] % count:
                    raise ValueError(f"can't be cut into {count} parts, its shape is {x.shape}")
                size = x.shape[0] // count
                x = x[number * size : (number + 1) * size]
            parts.append(x)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=how.split)
        return whole if self.rotated is None else whole[_in_pairs(whole.shape[0], *self.rotated)]


def _in_pairs(rows: int, head: int, turned: int) -> np.ndarray:
    """The rows that ours are, where the last ``turned`` of each ``head`` rows lie in halves."""
    if rows % head:
        raise ValueError(f"has {rows} rows, which is not a multiple of {head}, those of a head")
    order = np.arange(rows).reshape(-1, head)
    halves = order[:, head - turned :].reshape(-1, 2, turned // 2)
    order[:, head - turned :] = np.swapaxes(halves, 1, 2).reshape(-1, turned)
    return order.reshape(-1)


def known_layout() -> Layout:
    """Those of ``layouts.toml``."""
    return read_layout(Path(__file__).with_name("layouts.toml"))


def read_layout(path: Path) -> Layout:
    """A file of --map; CouldNotRun names the first line of it that is wrong."""
    try:
        table = tomllib.loads(read_text(path, str(path)))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise CouldNotRun(f"{path} is not TOML: {error}") from error
    found: dict[str, tuple[Alternative, ...]] = {}
    for ours, told in table.items():
        name = ours if ours.partition("/")[0] in PREFIXES else f"grad/{ours}"
        if strange := _placeholders(ours) - {"L", "E"}:
            raise CouldNotRun(f"{path}: {ours} may hold {{L}} and {{E}}, got {{{min(strange)}}}")
        given = told if isinstance(told, list) else [told]
        try:
            found[name] = tuple(_alternative(x, ours) for x in given)
        except (TypeError, ValueError) as error:
            raise CouldNotRun(f"{path}: {ours}: {error}") from error
    if not found:
        raise CouldNotRun(f"{path} must have lines ours = theirs, has none")
    return found


def _alternative(told: Any, ours: str) -> Alternative:
    if isinstance(told, str):
        told = {"theirs": told}
    if not isinstance(told, dict) or not isinstance(told.get("theirs"), str):
        raise ValueError('must be "theirs", { theirs = "…" } or a list of such')
    if unknown := sorted(told.keys() - KEYS):
        raise ValueError(f"must have keys among {', '.join(sorted(KEYS))}, got {unknown[0]}")
    theirs, part = told["theirs"], told.get("part", [0, 1])
    ranks, index = told.get("ranks", ()), told.get("index")
    local, split = told.get("local_experts", 0), told.get("split", 0)
    if strange := _placeholders(theirs) - PLACEHOLDERS:
        raise ValueError(f"theirs may hold {{L}}, {{E}}, {{M}} and {{R}}, got {{{min(strange)}}}")
    if type(ranks) is int and 1 <= ranks <= MOST_RANKS:
        ranks = list(range(ranks))
    few = isinstance(ranks, list) and 1 <= len(ranks) <= MOST_RANKS
    if ranks != () and not (few and all(type(n) is int and n >= 0 for n in ranks)):
        raise ValueError(f"ranks must be their number, or a list of numbers, got {ranks}")
    if type(local) is not int or local < 0 or type(split) is not int or split not in (0, 1, 2):
        raise ValueError("local_experts and split must be numbers, split 0, 1 or 2")
    if not isinstance(part, list) or [type(n) for n in part] != [int, int]:
        raise ValueError(f"part must be [i, n], got {part}")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be [i, n] with i in 0…n − 1, got {part}")
    if index not in (None, "{E}") or told.get("rotated") not in (None, "halves"):
        raise ValueError('index must be "{E}" and rotated "halves"')
    if type(told.get("transpose", False)) is not bool:
        raise ValueError("transpose must be true or false")
    if ("{R}" in theirs) != bool(ranks or local):
        raise ValueError("{R} needs ranks or local_experts, and they need {R}")
    if "E" not in _placeholders(ours) and (index or local or "{E}" in theirs):
        raise ValueError("{E} on the right needs {E} on the left")
    return Alternative(
        theirs,
        tuple(ranks),
        split,
        local,
        index is not None,
        told.get("transpose", False),
        (part[0], part[1]),
        told.get("rotated") is not None,
    )


def _placeholders(name: str) -> set[str]:
    return set(re.findall(r"\{([^}]*)\}", name))


def find(
    name: str,
    theirs: Theirs,
    config: ModelConfig | None,
    known: Layout,
    given: Layout | None = None,
) -> list[Found]:
    """Where a port has our tensor ``name``: nowhere, once, or in several places. What the ``given``
    layout says counts alone."""
    if given and config is not None and (found := list(_by_layout(name, theirs, given, config))):
        return found
    plain = [key for key in _plain(name) if key in theirs.tensors]
    found = [Found((key,), (theirs.tensors[key],), Alternative(key), 0, None) for key in plain]
    if config is not None:
        found += _by_layout(name, theirs, known, config)
    return found


def _plain(name: str) -> Iterator[str]:
    """Our own name, and that of a gradient's parameter."""
    yield name
    prefix, _, rest = name.partition("/")
    if prefix == "grad":
        yield rest


def _by_layout(name: str, theirs: Theirs, layout: Layout, config: ModelConfig) -> Iterator[Found]:
    prefix, _, rest = name.partition("/")
    layer, expert = layer_of(f"{rest}."), _expert_of(rest)
    of_layer = rest
    if expert is not None:
        of_layer = rest.replace(f".{EXPERTS}.{expert}.", f".{EXPERTS}.{{E}}.")
    of_any = of_layer
    if layer is not None:
        begin = layer_name(layer, "")
        of_any = f"{of_layer}.".replace(begin, layer_name("{L}", ""), 1)[:-1]
    module = None if layer is None else depth_of(config, layer) - 1
    turned = rotated_rows(rest, config)
    for ours in dict.fromkeys((rest, of_layer, of_any)):
        for how in layout.get(f"{prefix}/{ours}", ()):
            if "{M}" in how.theirs and (module is None or module < 0):
                continue
            if how.rotated and turned is None:
                continue
            filled = how.theirs.replace("{L}", str(layer)).replace("{M}", str(module))
            keys = list(_keys(filled, how, expert))
            for given in (keys, [_with_prefix(prefix, key) for key in keys]):
                if all(key in theirs.tensors for key in given):
                    pieces = tuple(theirs.tensors[key] for key in given)
                    rows = turned if how.rotated else None
                    yield Found(tuple(given), pieces, how, expert or 0, rows)


def _keys(filled: str, how: Alternative, expert: int | None) -> Iterator[str]:
    """The names of all pieces."""
    rank, number = 0, expert or 0
    if how.local_experts:
        rank, number = divmod(number, how.local_experts)
    for n in how.ranks or (rank,):
        yield filled.replace("{R}", str(n)).replace("{E}", str(number))


def _with_prefix(prefix: str, key: str) -> str:
    """The name with the prefix, behind the file's if it has one."""
    file, colon, name = key.rpartition(":")
    return f"{file}{colon}{prefix}/{name}"


def _expert_of(name: str) -> int | None:
    found = re.search(rf"\.{re.escape(EXPERTS)}\.(\d{{1,9}})\.", name)
    return int(found[1]) if found else None


def rotated_rows(name: str, config: ModelConfig) -> tuple[int, int] | None:
    """Of a weight whose rows are rotated: the rows of a head, and how many of the last are. None of
    any other."""
    layer = layer_of(name)
    if layer is None:
        return None
    shapes = attention_shapes(config)
    queries = list(shapes)[0 if config.q_latent is None else 2]
    keys = list(shapes)[-4]
    part = name.removeprefix(layer_name(layer, ""))
    if part == queries:
        return config.nope + config.rope, config.rope
    return (config.kv_latent + config.rope, config.rope) if part == keys else None
