"""V3's FP8 training, emulated: the linear maps of MLA, feed-forward, experts and MTP, whose
products take E4M3 numbers in tiles and add up as the recipe says. It claims no speed.

    table = fp8_table()                  # forward(params, tokens, config, ops=table)
    table = fp8_table(recipe_of("scale=ue8m0,bits=14"))

Each tile has a scale, max(largest, floor) / 448: activations and gradients 1 × 128 along the sum,
weights 128 × 128. The sum over each 128 terms is scaled and added in float32. For the weight's
gradient, whose sum is over tokens, both factors have tiles of 128 tokens; the activation that was
kept in FP8 is read, and quantised again. Two activations are kept otherwise: the input of
attention's output in E5M6 with scales that are powers of two, and of SwiGLU its inputs, from which
the backward makes its output again. Gradients pass through every rounding as if there were none.
Embedding, head, gate, norms and attention are the table's own. Source: DeepSeek-V3 (2412.19437)
section 3.3. Letters as in linear.py; R rows: all leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from .array import Array, expect, last, namespace
from .ops import REFERENCE, Op, Ops
from .ops.swiglu import swiglu_backward, swiglu_forward

__all__ = [
    "DEFAULT",
    "LARGEST",
    "FFNSaved",
    "LinearSaved",
    "Recipe",
    "Tiled",
    "ffn_backward",
    "ffn_forward",
    "fp8_table",
    "linear_backward",
    "linear_forward",
    "narrow",
    "quantised",
    "recipe_of",
    "scales",
    "spread",
]

TILE = 128
E4M3, E5M6 = (3, -6), (6, -14)  # bits of fraction, least exponent
STEP = 32  # terms that a tensor core adds at a time
LARGEST = 448.0  # of E4M3
LARGEST_E5M6 = 65024.0  # as float16 has exponents; the last with its six bits of fraction


Scale = Literal["float32", "ue8m0"]  # the latter a power of two, rounded up
WeightInput = Literal["kept", "exact"]


@dataclass(frozen=True)
class Recipe:
    """What implementations choose. ValueError for what can't be."""

    floor: float = 1e-4  # of a tile's largest number
    scale: Scale = "float32"
    promote: int = 128  # terms until a sum goes on in float32, a multiple of 128; 0: never
    bits: int = 0  # of a tensor core's sum: 14 on Hopper, 0 for float32
    weight_input: WeightInput = "kept"  # what is quantised again for the weight's gradient

    def __post_init__(self) -> None:
        if not 0 <= self.floor < np.inf:
            raise ValueError(f"floor must be a number of at least 0, got {self.floor}")
        if self.promote % TILE or self.promote < 0:
            raise ValueError(
                f"promote must be a multiple of {TILE}, or 0 for never, got {self.promote}"
            )
        if self.bits and not 2 <= self.bits <= 24:
            raise ValueError(f"bits must lie in 2…24, or be 0 for float32, got {self.bits}")
        for name, kind in (("scale", Scale), ("weight_input", WeightInput)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be {' or '.join(get_args(kind))}, got {getattr(self, name)}"
                )


DEFAULT = Recipe()  # V3's, as far as its report says it


def recipe_of(text: str) -> Recipe:
    """The recipe of a text like ``scale=ue8m0,bits=14``, DEFAULT's where it says nothing;
    ValueError for one that can't be."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Recipe)}
    given: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not equals or name not in defaults or name in given:
            raise ValueError(
                f"must be NAME=VALUE,… with each of {', '.join(defaults)} at most once, got {text}"
            )
        try:
            given[name] = type(defaults[name])(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value}") from None
    return Recipe(**given)


class Tiled(NamedTuple):
    """An array [rows, columns] in tiles, each number times its tile's scale."""

    numbers: Array  # [rows, columns] float32, of values that FP8 has
    scale: Array  # [⌈rows / a⌉, ⌈columns / b⌉] float32
    tile: tuple[int, int]  # a, b

    def values(self) -> Array:
        """[rows, columns] float32: the product, rounded once."""
        return self.numbers * spread(self.scale, self.tile, self.numbers.shape)

    def turned(self) -> Tiled:
        """The transpose, without rounding anew."""
        return Tiled(self.numbers.T, self.scale.T, self.tile[::-1])


def spread(scale: Array, tile: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """The scale of each number of an array [rows, columns] in tiles."""
    a, b = (min(pair) for pair in zip(tile, shape, strict=True))  # a tile may be larger than all
    return np.repeat(np.repeat(scale, a, axis=0)[: shape[0]], b, axis=1)[:, : shape[1]]


def scales(
    x: Array, tile: tuple[int, int], most: float, floor: float, *, power_of_two: bool
) -> Array:
    """The scale of each tile of ``x`` [rows, columns], float32: max(its largest number, floor) /
    most, or the next power of two."""
    largest = np.abs(x)
    for axis, length in enumerate(tile):
        if length > 1:
            places = np.arange(0, x.shape[axis], length)
            largest = np.maximum.reduceat(largest, places, axis=axis)
    found = np.maximum(largest, x.dtype.type(floor)).astype(np.float32) / np.float32(most)
    if power_of_two:
        found = np.exp2(np.ceil(np.log2(found.astype(np.float64)))).astype(np.float32)
    return np.asarray(found)


def quantised(
    x: Array, tile: tuple[int, int], recipe: Recipe = DEFAULT, *, e5m6: bool = False
) -> Tiled:
    """``x`` [rows, columns] in tiles of E4M3, or of E5M6 with scales that are powers of two; to the
    nearest, ties to even. A tile with NaN or ∞ is NaN."""
    x = np.asarray(x, np.float32)
    most = LARGEST_E5M6 if e5m6 else LARGEST
    power_of_two = e5m6 or recipe.scale == "ue8m0"
    scale = scales(x, tile, most, recipe.floor, power_of_two=power_of_two)
    with np.errstate(invalid="ignore"):  # (fp8.1)
        ratio = np.clip(x / spread(scale, tile, x.shape), -most, most)
        numbers = round_to(ratio, *(E5M6 if e5m6 else E4M3))
    return Tiled(numbers, scale, tile)


def narrow(x: Array, dtype: type | np.dtype[Any]) -> Array:
    """``x`` (any shape), float32 or float64, rounded once to the nearest number of a narrower type,
    ties to even.

    ml_dtypes rounds float64 to float32 first, and so twice. Here that first step rounds to odd:
    what lies between two float32 numbers becomes the one whose last bit is set, so the second step
    still sees on which side of a tie it is.
    """
    if x.dtype == np.float64 and dtype not in (np.float64, np.float32, np.float16):
        with np.errstate(over="ignore"):
            near = x.astype(np.float32)
        towards_zero = np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)
        odd = towards_zero.view(np.uint32) | (towards_zero.astype(np.float64) != x).astype(
            np.uint32
        )
        x = np.where(np.isfinite(x), odd.view(np.float32), near)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return x.astype(dtype)


def round_to(x: Array, fraction: int, least: int) -> Array:
    """``x`` float32 to the nearest number with so many bits of fraction and exponents from
    2^least on, ties to even; NaN stays."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    power = (bits & np.uint32(0x7F800000)).view(np.float32)  # the number's own of two, or 0
    unit = np.maximum(power, np.float32(2.0**least)) * np.float32(2.0**-fraction)
    shift = unit * np.float32(1.5 * 2**23)  # where float32 itself has that unit
    with np.errstate(invalid="ignore"):
        return np.copysign((x + shift) - shift, x)


# Products


def product(a: Tiled, b: Tiled, recipe: Recipe) -> Array:
    """Σ_k a[m, k] b[n, k] [M, N] float32. The tiles of both are 128 long along the sum."""
    terms = a.numbers.shape[1]
    total = np.zeros((a.numbers.shape[0], b.numbers.shape[0]), np.float32)
    of_a, of_b = (np.repeat(x.scale, x.tile[0], axis=0)[: len(x.numbers)] for x in (a, b))
    part = None
    for i, first in enumerate(range(0, terms, TILE)):
        here = slice(first, first + TILE)
        found = tensor_core(a.numbers[:, here], b.numbers[:, here], recipe.bits)
        found = found * of_a[:, i, None] * of_b[None, :, i]  # (fp8.3)
        part = found if part is None else added(np.stack((part, found), axis=-1), recipe.bits)
        if first + TILE >= terms or (recipe.promote and (first + TILE) % recipe.promote == 0):
            total, part = total + part, None
    return total


def tensor_core(a: Array, b: Array, bits: int) -> Array:
    """a bᵀ in float32; with ``bits`` 32 products at a time and the sum so far, `added`."""
    if not bits:
        return np.asarray(np.matmul(a, b.T))
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(0, a.shape[1], STEP):
        products = a[:, None, k : k + STEP] * b[None, :, k : k + STEP]
        total = added(np.concatenate((total[..., None], products), axis=-1), bits)
    return total


def added(terms: Array, bits: int) -> Array:
    """The sum along the last axis; with ``bits`` as Hopper's tensor cores add: each term is cut off
    at the place of the last of so many bits of the largest."""
    if not bits:
        return np.asarray(np.sum(terms, axis=-1))
    _, exponent = np.frexp(np.max(np.abs(terms), axis=-1, keepdims=True))
    unit = np.exp2((exponent - bits).astype(np.float32))
    return np.asarray(np.sum(np.trunc(terms / unit), axis=-1) * unit[..., 0])


# The linear map


class LinearSaved(NamedTuple):
    """What `linear_forward` keeps for `linear_backward`."""

    x: Tiled | Array  # [R, I]: kept in FP8, or exact
    w: Tiled  # [O, I]
    x_shape: tuple[int, ...]
    recipe: Recipe


def linear_forward(
    x: Array, w: Array, recipe: Recipe = DEFAULT, *, e5m6: bool = False
) -> tuple[Array, LinearSaved]:
    """y […, O] = x Wᵀ of ``x`` […, I] and ``w`` [O, I], in the type of x. e5m6: how x is kept."""
    namespace(x=x, w=w)
    expect("w", w, "(O, I)", (None, last(x, "x")))
    rows = x.reshape(-1, w.shape[1])
    x_tiled, w_tiled = quantised(rows, (1, TILE), recipe), quantised(w, (TILE, TILE), recipe)
    y = product(x_tiled, w_tiled, recipe)  # (fp8.2)
    again = e5m6 or recipe.weight_input == "exact"  # else it is kept as it is multiplied
    kept_x = keep(rows, recipe, e5m6=e5m6) if again else x_tiled
    saved = LinearSaved(kept_x, w_tiled, tuple(x.shape), recipe)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1), saved


def linear_backward(dy: Array, saved: LinearSaved) -> tuple[Array, Array]:
    """(dx […, I], dw [O, I]) from ``dy`` […, O], in tiles along O for the one, along the tokens for
    the other."""
    x, w, x_shape, recipe = saved
    expect("dy", dy, "(…, O)", (*x_shape[:-1], w.numbers.shape[0]))
    rows = dy.reshape(-1, w.numbers.shape[0])
    dx = product(quantised(rows, (1, TILE), recipe), w.turned(), recipe)  # (fp8.4)
    dy_tiled, x_tiled = (quantised(side.T, (1, TILE), recipe) for side in (rows, kept(x)))
    dw = product(dy_tiled, x_tiled, recipe)  # (fp8.5)
    return dx.astype(dy.dtype).reshape(x_shape), dw.astype(dy.dtype)


def keep(rows: Array, recipe: Recipe, *, e5m6: bool = False) -> Tiled | Array:
    """An activation [R, I] as it waits for the backward."""
    exact = recipe.weight_input == "exact"
    return rows if exact else quantised(rows, (1, TILE), recipe, e5m6=e5m6)


def kept(x: Tiled | Array) -> Array:
    return x.values() if isinstance(x, Tiled) else x


# What is made of it


class FFNSaved(NamedTuple):
    """What `ffn_forward` keeps for `ffn_backward`."""

    gate: LinearSaved
    up: LinearSaved
    inputs: tuple[Tiled | Array, Tiled | Array]  # of SwiGLU
    down: LinearSaved


def ffn_forward(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    recipe: Recipe = DEFAULT,
    *,
    ops: Any = None,
) -> tuple[Array, FFNSaved]:
    """As `refimpl.ops.ffn_forward`."""
    gate, gate_saved = linear_forward(x, w_gate, recipe)
    up, up_saved = linear_forward(x, w_up, recipe)
    hidden, _ = swiglu_forward(gate, up)
    y, down = linear_forward(hidden, w_down, recipe)
    width = w_gate.shape[0]
    inputs = keep(gate.reshape(-1, width), recipe), keep(up.reshape(-1, width), recipe)
    return y, FFNSaved(gate_saved, up_saved, inputs, down)


def ffn_backward(dy: Array, saved: FFNSaved) -> tuple[Array, Array, Array, Array]:
    """As `refimpl.ops.ffn_backward`; SwiGLU's output is made again of its kept inputs."""
    recipe, shape = saved.down.recipe, saved.down.x_shape
    gate, up = (kept(x).astype(dy.dtype).reshape(shape) for x in saved.inputs)
    hidden, of_swiglu = swiglu_forward(gate, up)  # (fp8.6)
    again = keep(hidden.reshape(-1, shape[-1]), recipe)
    dhidden, dw_down = linear_backward(dy, saved.down._replace(x=again))
    dgate, dup = swiglu_backward(dhidden, of_swiglu)
    dx_gate, dw_gate = linear_backward(dgate, saved.gate)
    dx_up, dw_up = linear_backward(dup, saved.up)
    return dx_gate + dx_up, dw_gate, dw_up, dw_down


def fp8_table(recipe: Recipe = DEFAULT) -> Ops:
    """The reference's table with the recipe's linear maps; for NumPy's arrays."""

    def inner(w_o: Array | None = None) -> Op[Any, Any]:
        def forward(x: Array, w: Array) -> Any:
            return linear_forward(x, w, recipe, e5m6=w is w_o)

        return Op(forward, linear_backward)

    def mla_forward(*args: Any, ops: Ops, **kwargs: Any) -> Any:
        own = ops | {"linear": inner(args[-1])}
        return REFERENCE.mla.forward(*args, ops=own, **kwargs)

    def mtp_forward(*args: Any, ops: Ops, **kwargs: Any) -> Any:
        return REFERENCE.mtp.forward(*args, ops=ops | {"linear": inner()}, **kwargs)

    return REFERENCE | {
        "ffn": Op(partial(ffn_forward, recipe=recipe), ffn_backward),
        "mla": Op(mla_forward, REFERENCE.mla.backward),
        "mtp": Op(mtp_forward, REFERENCE.mtp.backward),
    }
