"""The main job: check every op and the whole tiny model on real text, tensor by tensor."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .check import MODEL_FD_TOLERANCE, MODEL_VALIDITY, Report, check
from .check.cases import CASES, RandomDraw, model_case, pair_of
from .errors import CouldNotRun
from .ops import IMPLEMENTATIONS, Op
from .text import Text

__all__ = ["MODEL", "NAMES", "Settings", "backward_from_file", "select", "steps"]

MODEL = "model"
NAMES = (*CASES, MODEL)  # in reading order


@dataclass(frozen=True)
class Settings:
    """What one verification runs with; the defaults are those of ``refimpl verify``."""

    text: Text
    examples: int = 5
    model_examples: int = 2
    seed: int = 0
    implementation: str = "reference"
    backend: str = "numpy"
    dtype: str = "float64"
    convention: str = "official"
    digits: int | None = None


def select(names: Sequence[str]) -> list[str]:
    """The ops to verify, in reading order; all of them and the model if ``names`` is empty."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise CouldNotRun(f"unknown op {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return [name for name in NAMES if name in names or not names]


def steps(names: Sequence[str], settings: Settings, replace: Mapping[str, Op] | None = None) -> Iterator[Report]:
    """One report an example, op after op; ``replace`` puts other pairs in the place of ops (to grade them)."""
    table = IMPLEMENTATIONS.get(settings.implementation)
    if table is None:
        raise CouldNotRun(
            f"--implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {settings.implementation}"
        )
    place = _placement(settings.backend)
    for name in names:
        for example in range(settings.model_examples if name == MODEL else settings.examples):
            seed = settings.seed + example
            draw = RandomDraw(seed, settings.text.data)
            common: dict[str, Any] = {"op": name, "seed": seed, "dtype": settings.dtype}
            if name == MODEL:
                case, tensors, tested = model_case(draw, convention=settings.convention, table=table)
                common |= {"names": tensors, "difference_tolerance": MODEL_FD_TOLERANCE, "validity": MODEL_VALIDITY}
            else:
                case, tested = CASES[name](draw), (replace or {}).get(name) or pair_of(name, table)
                parameters = inspect.signature(pair_of(name).forward).parameters.values()
                common |= {"names": [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]}
                common |= {"digits": settings.digits, "replay": case.replay}
            if place is not None:
                common |= {"reference": tested}
                tested = _placed(tested, place)
            yield check(*tested, case.inputs, case.kwargs, **common)


def _placement(backend: str) -> Callable[[Any], Any] | None:
    """What moves an array to the backend; None for NumPy."""
    if backend == "numpy":
        return None
    if backend != "cupy":
        raise CouldNotRun(f"--backend must be numpy or cupy, got {backend}")
    try:
        import cupy  # type: ignore[import-not-found]
    except ImportError as error:
        raise CouldNotRun(f"--backend cupy needs CuPy: pip install 'deepseek-refimpl[cuda13]' ({error})") from error
    try:
        if cupy.cuda.runtime.getDeviceCount() < 1:
            raise CouldNotRun("--backend cupy needs a GPU, found none")
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise CouldNotRun(f"--backend cupy needs a GPU: {error}") from error
    return cupy.asarray  # type: ignore[no-any-return]


def _placed(pair: Op, place: Callable[[Any], Any]) -> Op:
    """The pair run on another device, from and to NumPy arrays."""

    def there(x: Any) -> Any:
        if isinstance(x, (np.ndarray, np.generic)):
            return place(x)
        if isinstance(x, dict):
            return {key: there(value) for key, value in x.items()}
        if isinstance(x, tuple):
            return type(x)(*map(there, x)) if hasattr(x, "_fields") else tuple(map(there, x))
        return x

    def back(x: Any) -> Any:
        if isinstance(x, tuple):
            return type(x)(*map(back, x)) if hasattr(x, "_fields") else tuple(map(back, x))
        return x.get() if hasattr(x, "get") and hasattr(x, "dtype") else x

    def forward(*inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        y, saved = pair.forward(*map(there, inputs), **there(kwargs))
        return back(y), saved

    return Op(forward, lambda dy, saved: back(pair.backward(there(dy), saved)))


def backward_from_file(op: str, path: Path) -> Op:
    """The op with the ``<op>_backward`` (and, if defined, ``<op>_forward``) of a Python file in place of ours."""
    if op not in CASES:
        raise CouldNotRun(f"unknown op {op}; there are {', '.join(CASES)}")
    if not path.is_file():
        raise CouldNotRun(f"{path} is not a file")
    spec = importlib.util.spec_from_file_location("graded", path)
    if spec is None or spec.loader is None:
        raise CouldNotRun(f"{path} must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CouldNotRun(f"{path} can't be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, f"{op}_backward"):
        raise CouldNotRun(f"{path} must define {op}_backward(dy, saved)")
    ours = pair_of(op)
    return Op(getattr(module, f"{op}_forward", ours.forward), getattr(module, f"{op}_backward"))
