"""The gradient of the loss in every activation, beside the model's own forward in which that
activation moves by an infinitesimal (a complex step, exact to rounding)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refimpl.grads.cotangents as cotangents
from refimpl.array import einsum
from refimpl.grads.cotangents import Calls
from refimpl.grads.request import AFTER_ATTENTION, INNER, is_inner
from refimpl.model import forward
from refimpl.ops import REFERENCE, AnyOp, Op, Ops
from refimpl.parameters import FINAL_NORM, layer_name

from grads.examples import TINY, TOKENS, read, stream
from random_parameters import random_parameters

STEP = 1e-100  # its square is 0
Move = Callable[[Any], Any]  # of an array
PARAMS = random_parameters(TINY)
COMPLEX = {name: p.astype(complex) for name, p in PARAMS.items()}
GIVEN: dict[str, Any] = {"mtp": True, "balance_alpha": TINY.balance_weight}


def forward_of(op: AnyOp, is_meant: Callable[..., bool], change: Callable[..., Any]) -> AnyOp:
    """``op``, whose output ``change`` replaces in the calls that are meant."""

    def call(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*args, **kwargs)
        return (change(y, *args) if is_meant(*args) else y), saved

    return Op(call, op.backward)


def calls_before(number: int, among: Callable[..., bool] = lambda *args: True) -> Any:
    """Whether a call, of those ``among`` them, is the one behind so many."""
    count = iter(range(10**6))
    return lambda *args: among(*args) and next(count) == number


def behind(weight: np.ndarray, move: Move) -> Ops:
    """The ops of a model in which the output of the one with this weight is moved."""
    changed = {
        name: forward_of(op, lambda *x: len(x) > 1 and x[1] is weight, lambda y, *_: move(y))
        for name, op in REFERENCE.items()
    }
    return REFERENCE | changed


def moved(name: str, move: Move) -> Ops:
    """The ops of a model one of whose activations is moved."""
    ops, own = REFERENCE, name.removeprefix("model.layers.")
    if name == "model.embed_tokens":
        return ops | {
            "embedding": forward_of(ops.embedding, calls_before(0), lambda y, *_: move(y))
        }
    if name == "model.norm":
        return behind(COMPLEX[FINAL_NORM], move)
    number, _, part = own.partition(".")
    layer, dense = int(number), int(number) < TINY.dense_layers
    if part == "":
        network = "ffn" if dense else "moe"
        meant = calls_before(layer if dense else layer - TINY.dense_layers)
        return ops | {network: forward_of(ops[network], meant, lambda y, *_: move(y))}
    if part in ("self_attn", AFTER_ATTENTION):

        def attended(y: Any, *_: Any) -> Any:
            return y._replace(y=move(y.y))

        return ops | {"mla": forward_of(ops.mla, calls_before(layer), attended)}
    if part == "mlp.gate.scores":
        meant = calls_before(layer - TINY.dense_layers)

        def scored(y: Any, *_: Any) -> Any:
            scores = move(y.scores)
            chosen = np.take_along_axis(scores, y.indices, axis=-1)
            weights = TINY.weight_rule[1] * chosen / chosen.sum(axis=-1, keepdims=True)
            return y._replace(scores=scores, weights=weights)

        return ops | {"router": forward_of(ops.router, meant, scored)}
    return moved_inside(layer, part.removeprefix("self_attn."), move)


def moved_inside(layer: int, part: str, move: Move) -> Ops:
    """The same of what stands inside attention."""
    ops, c = REFERENCE, TINY.kv_latent
    if part == "latent":
        norm = COMPLEX[layer_name(layer, "self_attn.kv_a_layernorm.weight")]
        key = calls_before(layer, lambda x: x.shape[2] == 1)

        def shown(y: Any) -> Any:  # the other half is moved by the other op
            zeros = np.zeros((*y.shape[:2], c + TINY.rope - y.shape[-1]))
            joined = (y, zeros) if y.shape[-1] == c else (zeros, y)
            both = move(np.concatenate(joined, axis=-1))
            return both[..., :c] if y.shape[-1] == c else both[..., c:]

        return behind(norm, shown) | {
            "rope": forward_of(ops.rope, key, lambda y, x: shown(y[:, :, 0])[:, :, None])
        }
    meant = calls_before(layer)
    if part == "probabilities":

        def mixed(y: Any, q: Any, k: Any, v: Any) -> Any:
            nothing = np.zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
            return y + einsum("bhts,bshv->bthv", move(nothing), v)

        return ops | {"attention": forward_of(ops.attention, meant, mixed)}

    def attention(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if meant():
            given["qkv".index(part)] = move(given["qkv".index(part)])
        return ops.attention.forward(*given, **kwargs)

    return ops | {"attention": Op(attention, ops.attention.backward)}


def slope(name: str, direction: np.ndarray, routes: Any) -> float:
    """The derivative of the loss as the activation moves in that direction."""
    moves = []

    def move(x: np.ndarray) -> np.ndarray:
        moves.append(x.shape)
        return x + 1j * STEP * direction

    output, _ = forward(COMPLEX, TOKENS, TINY, ops=moved(name, move), routes=routes)
    assert len(moves) == 1 + name.endswith(".latent")
    assert output.loss is not None
    return float(output.loss.imag / STEP)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("truth") / "out"
    first = stream(PARAMS, TINY, out, **GIVEN, activations="*self_attn.*")
    assert all(is_inner(name) for name in first.activations)
    inner = read(out)
    stream(PARAMS, TINY, out.with_name("other"), **GIVEN, activations="*")
    return inner | read(out.with_name("other"))


def wrong_ones(found: dict[str, np.ndarray], routes: Any, only: str = "") -> list[str]:
    """The cotangents that are not the derivatives of the loss."""
    rng, wrong = np.random.default_rng(0), []
    for name, x in found.items():
        if name.startswith("cot/") and name.endswith(only):
            direction = rng.normal(size=x.shape)
            terms = x * direction
            wanted = slope(name[4:], direction, routes)
            if not abs(terms.sum() - wanted) <= 1e-13 * np.abs(terms).sum():
                wrong.append(name[4:])
    return wrong


ROUTES = forward(PARAMS, TOKENS, TINY)[0].routes


def test_every_activation_has_its_cotangent(truth: dict[str, np.ndarray]) -> None:
    """MTP's layers included; each is the derivative of the whole loss."""
    names = {name[4:] for name in truth if name.startswith("cot/")}
    assert names == {name[4:] for name in truth if name.startswith("act/")}
    moe = sum(layer >= TINY.dense_layers for layer in range(5))
    assert len(names) == 2 + 5 * (3 + len(INNER)) + moe
    assert all(truth[f"cot/{name}"].shape == truth[f"act/{name}"].shape for name in names)
    assert wrong_ones(truth, ROUTES) == []


def without_balance(dy: Any, saved: Any) -> Any:
    return SCORES_BACKWARD((dy[0], None), saved)


SCORES_BACKWARD = cotangents.scores_backward
COTANGENTS, INSIDE = Calls.cotangents, Calls._inside


def stream_twice(self: Calls, block: Any) -> Any:
    """The stream's own gradient, without what comes back through the layer's second half."""
    found = COTANGENTS(self, block)
    before = found[f"model.layers.{self.layer}"]
    return found | {name: before for name in found if name.endswith(AFTER_ATTENTION)}


def unrotated(self: Calls, block: Any) -> Any:
    found = INSIDE(self, block)
    key = found["latent"][..., TINY.kv_latent :]
    back = REFERENCE.rope.backward(key[:, :, None], block.attention.mla.project.k_pe)[:, :, 0]
    return found | {"latent": np.concatenate((found["latent"][..., : TINY.kv_latent], back), -1)}


def one_head(self: Calls, block: Any) -> Any:
    found = INSIDE(self, block)
    _, dk, _ = self.call(block.attention.mla.attention).gradients
    latent = found["latent"].copy()
    latent[..., TINY.kv_latent :] = dk[:, :, 0, TINY.nope :]
    return found | {"latent": latent}


MISTAKES = {
    "scores without the balance loss": (cotangents, "scores_backward", without_balance, "scores"),
    "the layer's output for after_attention": (Calls, "cotangents", stream_twice, AFTER_ATTENTION),
    "the shared key turned back": (Calls, "_inside", unrotated, "latent"),
    "the shared key's gradient of one head": (Calls, "_inside", one_head, "latent"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, wrong, kind = MISTAKES[mistake]
    monkeypatch.setattr(where, name, wrong)
    pattern = "*self_attn.*" if kind == "latent" else "*"
    stream(PARAMS, TINY, tmp_path / "out", **GIVEN, activations=pattern, only="model.norm*")
    found = read(tmp_path / "out")
    seen = wrong_ones(found, ROUTES, only=kind)
    assert len(seen) == sum(name.endswith(kind) for name in found if name.startswith("cot/"))
