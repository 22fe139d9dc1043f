"""`refimpl power` with what needs more than the package: the golden values, and, where they are
installed, torch's gradcheck and JAX's check_grads on the same draws (``make power``).

``--diagnosis`` prints instead how many planted bugs `refimpl check` names (some minutes)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from refimpl.check import RULES
from refimpl.check.planted import FUNCTIONS, Planted, plant
from refimpl.cli.power import show
from refimpl.ops import Op
from refimpl.port.power import Draw, Row, drawn
from refimpl.port.power import kill as kill_by_rules

from golden import values as golden_values
from port.outside import OUTSIDE
from port.rates import of_outside, rates_of_cases, rates_of_model
from port.truths import model_truth

DRAWS = 3  # of an op, for gradcheck and check_grads


def kill(bug: Planted, rules: Sequence[str] = RULES) -> Row:
    """Every rule of the checker, and the golden values."""
    row = kill_by_rules(bug, rules)
    return row._replace(caught=row.caught | ({"golden"} if golden(bug) else set()))


def golden(bug: Planted) -> bool:
    """Whether a golden case of the op is missed."""
    planted: Any = plant(bug)
    if bug.op in FUNCTIONS:
        instead = {"expert_load": "load", "bias_update": "update"}[bug.op]
        changed = {instead: getattr(planted, bug.op)}
        return differs("router", golden_values.router(golden_values.pair("router"), **changed))
    if isinstance(planted, Op):
        file, way = golden_values.WAYS[bug.op]
        return differs(file, way(planted))
    return differs("model", golden_values.model(module=planted))


def differs(file: str, run: golden_values.Run) -> bool:
    return any(
        not error <= golden_values.TOLERANCE
        for name, case in golden_values.load(file).items()
        for error in golden_values.compare(file, name, run(case)).values()
    )


# Other people's checkers, as their users call them: with their own tolerances, on Σ w · y


def on_draws(check: Callable[[Any, Draw], bool]) -> Callable[[Planted], bool]:
    """Whether a checker calls the bug's pair wrong in one of the draws."""

    def sees(bug: Planted) -> bool:
        pair = plant(bug)
        if not isinstance(pair, Op):
            return False
        return any(not check(pair, drawn(bug.op, seed)) for seed in range(DRAWS))

    return sees


def weighted(pair: Any, draw: Draw, given: Sequence[np.ndarray]) -> tuple[float, Any]:
    """Σ w · y over all outputs, and a function that gives its gradients in the given inputs."""
    left = iter(given)
    inputs = [None if x is None else np.asarray(next(left), np.float64) for x in draw.case.inputs]
    y, saved = pair.forward(*inputs, **draw.kwargs)
    members = [np.asarray(x) for x in (y if isinstance(y, tuple) else (y,))]
    members = [x for x in members if x.dtype.kind == "f"]
    loss = sum(float(np.sum(w * x)) for w, x in zip(draw.cotangents, members, strict=True))

    def gradients() -> list[np.ndarray]:
        dy = tuple(draw.cotangents) if isinstance(y, tuple) else draw.cotangents[0]
        found = pair.backward(dy, saved)
        found = found if isinstance(found, tuple) else (found,)
        return [np.asarray(g, np.float64) for g in found if g is not None]

    return loss, gradients


def torch_gradcheck(pair: Any, draw: Draw) -> bool:
    import torch

    class Weighted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *xs: Any) -> Any:
            loss, ctx.gradients = weighted(pair, draw, [x.detach().numpy() for x in xs])
            return torch.tensor(loss, dtype=torch.float64)

        @staticmethod
        def backward(ctx: Any, dloss: Any) -> Any:
            return tuple(float(dloss) * torch.from_numpy(g.copy()) for g in ctx.gradients())

    xs = [torch.from_numpy(x.copy()).requires_grad_() for x in draw.case.inputs if x is not None]
    try:
        return bool(torch.autograd.gradcheck(Weighted.apply, xs, raise_exception=False))
    except Exception:  # shapes that do not fit
        return False


def jax_check_grads(pair: Any, draw: Draw) -> bool:
    import jax
    from jax.test_util import check_grads

    jax.config.update("jax_enable_x64", True)

    @jax.custom_vjp
    def loss(*xs: Any) -> Any:
        return jax.pure_callback(
            lambda *given: np.float64(weighted(pair, draw, given)[0]),
            jax.ShapeDtypeStruct((), np.float64),
            *xs,
        )

    def backward(xs: Any, dloss: Any) -> Any:
        found = jax.pure_callback(
            lambda *given: tuple(weighted(pair, draw, given)[1]()),
            tuple(jax.ShapeDtypeStruct(x.shape, np.float64) for x in xs),
            *xs,
        )
        return tuple(dloss * g for g in found)

    loss.defvjp(lambda *xs: (loss(*xs), xs), backward)
    xs = [jax.numpy.asarray(x) for x in draw.case.inputs if x is not None]
    try:
        check_grads(loss, xs, order=1, modes=["rev"])
    except Exception:
        return False
    return True


def diagnosis() -> int:
    """Print how many bugs are named, on fresh draws; 1 if a mistake is given a wrong name."""
    wrong = 0
    with TemporaryDirectory() as folder:
        truth = model_truth(Path(folder), 12)
        for dtype in ("float32", "bfloat16"):
            for where, rates in (
                ("cases of ops", rates_of_cases(dtype, range(10, 13))),
                ("tiny model", rates_of_model(truth, dtype)),
            ):
                print(f"{dtype:<9} {where:<13}{rates}")
                for line in rates.missed:
                    print(f"    {line}")
                wrong += rates.found["wrong"] if dtype == "float32" else 0
        told = {bug: of_outside(truth, bug) for bug in OUTSIDE}
    named = [bug.name for bug, found in told.items() if found is not None and found.named]
    shown = sum(found is not None for found in told.values())
    print(f"outside the catalogue, float32: {len(told)}, {shown} shown, {len(named)} given a name")
    for name in named:
        print(f"    {name}")
    return int(wrong + len(named) > 0)


def main() -> int:
    """Print the tables; 1 if a bug survives or clean code is called wrong."""
    if "--diagnosis" in sys.argv:
        return diagnosis()
    extra = {"golden": golden}
    others = {"torch": ("gradcheck", torch_gradcheck), "jax": ("check_grads", jax_check_grads)}
    for module, (name, check) in others.items():
        if find_spec(module) is None:
            print(f"{name}: skipped, {module} is not installed (make oracle)")
        elif "--others" in sys.argv:
            extra[name] = on_draws(check)
    return show(40, 9, None, extra)


if __name__ == "__main__":
    sys.exit(main())
