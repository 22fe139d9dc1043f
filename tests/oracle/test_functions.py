"""Functions of torch and JAX through `refimpl.port.check`: formulas that share no code with ours
pass on every regime, in float64 and float32, and a mistake in them is named. Needs the extras
`oracle` and `jax`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `oracle` is not installed")

from refimpl.port import check

from golden import mla, moe

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def recorded(forward: Callable[..., Any]) -> Pair:
    """A forward in torch with the backward that autograd makes of it."""

    def run(*inputs: Any, **kwargs: Any) -> Any:
        leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
        y = forward(*leaves, **kwargs)
        return y, (leaves, y)

    def backward(dy: Any, saved: Any) -> Any:
        leaves, y = saved
        y, dy = (y, dy) if isinstance(y, tuple) else ((y,), (dy,))
        total = sum((a * b).sum() for a, b in zip(y, dy, strict=True))
        given = [x for x in leaves if x is not None]
        found = iter(
            torch.autograd.grad(
                total, given, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )
        return tuple(None if x is None else next(found) for x in leaves)

    return run, backward


def torch_mla(x: Any, cache: Any, *weights: Any, **kwargs: Any) -> Any:
    names = ("w_q_a", "w_q_a_norm", "w_q_b", "w_kv_a", "w_kv_a_norm", "w_kv_b", "w_o")
    w = {name: a for name, a in zip(names, weights, strict=True) if a is not None}
    kwargs["inv_freq"] = kwargs["inv_freq"].to(x.dtype)  # as ports do
    return tuple(y.to(x.dtype) for y in mla.mla(x, cache, w, **kwargs))


def torch_moe(x: Any, gates: Any, *weights: Any, indices: Any) -> Any:
    names = ("w_gate", "w_up", "w_down", "w_shared_gate", "w_shared_up", "w_shared_down")
    w = {name: a for name, a in zip(names, weights, strict=True) if a is not None}
    return moe.moe(x, gates, w, indices)


@pytest.mark.parametrize(("op", "forward"), [("mla", torch_mla), ("moe", torch_moe)])
def test_torch(op: str, forward: Callable[..., Any]) -> None:
    result = check(op, *recorded(forward), array=torch.from_dlpack, examples=1)
    assert result.ok, str(result)
    assert result.not_run[0].startswith("longdouble")


def test_a_mistake_in_torch_is_named() -> None:
    """The gate weights get no gradient."""
    forward, backward = recorded(torch_moe)

    def wrong(dy: Any, saved: Any) -> Any:
        dx, dweights, *dw = backward(dy, saved)
        return dx, 0 * dweights, *dw

    result = check("moe", forward, wrong, array=torch.from_dlpack)
    assert result.bugs == ["moe: gate path missing"], str(result)
    assert result.first_wrong == "moe/grad/weights"


def test_torch_in_another_type_is_one_line() -> None:
    forward, backward = recorded(torch_moe)

    def half(dy: Any, saved: Any) -> Any:
        return tuple(None if g is None else g.bfloat16() for g in backward(dy, saved))

    result = check("moe", forward, half, array=torch.from_dlpack, examples=1)
    assert str(result).count("NumPy can't take a result of type Tensor (torch.bfloat16)") == 1
    assert next(t for t in result.tensors if t.tensor == "out/y").verdict == "PASS"


@pytest.mark.parametrize("wide", [True, False])
def test_jax(wide: bool) -> None:
    """With 64 bits, and without: float64 and differences are then named as not run."""
    jax = pytest.importorskip("jax", reason="the extra `jax` is not installed")
    jnp = jax.numpy

    def forward(x: Any, w: Any, *, eps: float) -> Any:
        r = 1 / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
        return w * x * r, (x, w, r)

    def backward(dy: Any, saved: Any) -> Any:
        x, w, r = saved
        n, dn = x * r, dy * w
        return r * (dn - n * jnp.mean(dn * n, axis=-1, keepdims=True)), jnp.sum(dy * n, (0, 1))

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", wide)
    try:
        result = check("rms_norm", forward, backward, array=jax.dlpack.from_dlpack, examples=1)
    finally:
        jax.config.update("jax_enable_x64", before)
    assert result.ok, str(result)
    assert set(result.tensors[0].units) == ({"float64", "float32"} if wide else {"float32"})
    assert ("float64: array() makes float32 of float64" in result.not_run) != wide
