"""The column `cuda` on a pretended CuPy, in this process: kernels under the interpreter, products
by its cuBLAS, bfloat16 included."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from refimpl.grads.rounded import round_bfloat16
from refimpl.kernels import columns
from refimpl.kernels.adamw import adamw
from refimpl.ops import REFERENCE, Op, Ops
from refimpl.stored import DTYPES, stored
from refimpl.train import machine

from .launches import PretendedLaunch
from pretended_cupy import Pretended, here, there
from support import FULL


def make_cuda_table(*, attention: bool) -> Ops:
    """The column. Without its kernels of attention, which take most of the time, in their place is
    the reference in float32, which rounds what it gives to the type of its inputs."""
    table = columns.cuda_table(PretendedLaunch())
    return table if attention else table | {"attention": ATTENTION}


def _forward(q: Any, k: Any, v: Any, **given: Any) -> Any:
    given = {name: here(x) for name, x in given.items()}
    inputs = map(here, (q, k, v))
    if str(q.dtype) != "bfloat16":
        y, saved = REFERENCE.attention.forward(*inputs, **given)
        return there(y), (REFERENCE.attention, saved)
    y, saved = NARROW.forward(*inputs, **given)
    return there(y), (NARROW, saved)


def _backward(do: Any, saved: Any) -> Any:
    pair, inner = saved
    return there(pair.backward(here(do), inner))


NARROW = stored(REFERENCE.attention, "attention", round_bfloat16, DTYPES["bfloat16"])
ATTENTION = Op(_forward, _backward)


def use_cuda(monkeypatch: pytest.MonkeyPatch, *, attention: bool = FULL) -> Ops:
    """Until the test ends, commands and machines find CuPy, a device and this table; the table."""
    table = make_cuda_table(attention=attention)
    monkeypatch.setitem(sys.modules, "cupy", Pretended("cupy"))
    monkeypatch.setattr(columns, "device_launch", PretendedLaunch)
    real = columns.table_of
    for module in ("kernels.columns", "verify", "train.machine", "grads.request"):
        found = importlib.import_module(f"refimpl.{module}")
        monkeypatch.setattr(
            found, "table_of", lambda n, *more: table if n == "cuda" else real(n, *more)
        )
    optimizer = adamw(PretendedLaunch())
    of_others = machine.optimizer_of
    monkeypatch.setattr(
        machine, "optimizer_of", lambda n: optimizer if n == "cuda" else of_others(n)
    )
    return table
