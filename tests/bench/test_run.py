"""A row measured from end to end on a pretended device, and torch's side of it."""

from __future__ import annotations

import re
import subprocess
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.bench import run
from refimpl.bench.measure import Recorder
from refimpl.bench.rows import ROWS
from refimpl.bench.run import (
    BASELINES,
    baselines,
    commit_of_checkout,
    header,
    measure_row,
    select_rows,
)
from refimpl.bench.works import Maker, worst_error
from refimpl.errors import CouldNotRun

from bench.examples import TESTED, IdleDevice, on_interpreter
from bench.sizes import SMALL
from kernel_support import InterpreterLaunch
from support import ROOT


def test_select_rows() -> None:
    assert select_rows([]) == list(ROWS.values())
    assert [row.name for row in select_rows(["AdamW step", "RoPE forward"])] == [
        "RoPE forward",
        "AdamW step",
    ]
    with pytest.raises(
        CouldNotRun,
        match=r"^unknown row softmax; there are RMSNorm forward; RMSNorm backward; [^\n]*$",
    ):
        select_rows(["softmax"])


class FakeTorch(types.ModuleType):
    VERSION = "0.0"

    class TorchDevice(IdleDevice):
        def baseline(
            self, name: str, arrays: Sequence[Any], compiled: bool
        ) -> Callable[[], object]:
            if compiled:
                raise RuntimeError("no compiler\nand more lines")
            return lambda: None


@on_interpreter
def test_a_row_from_end_to_end() -> None:
    """Every piece in its place, on a pretended device; what torch can't do is a note."""
    device = IdleDevice()
    found = measure_row(device, ROWS["RMSNorm forward"], FakeTorch("torch"), SMALL, 20)
    assert device.captured == [4, 4 * 334]  # 4 · 800 bytes are the first above 3 · 1000
    assert device.freed == 2  # before the call whose memory is measured, and before torch
    assert (found.name, found.shape, found.storage, found.bytes) == (
        "RMSNorm forward",
        "5 × 40",
        "bfloat16",
        800,
    )
    assert found.eager is not None
    assert found.compiled is found.compiled_peak is None
    assert found.peak == found.eager_peak == 4096
    assert set(found.errors) == {"y", "dx", "dw"}
    assert 0 < found.error <= 1
    assert found.asked == ROWS["RMSNorm forward"].asked()
    assert found.notes == ("torch compiled: RuntimeError: no compiler",)
    alone = measure_row(device, ROWS["CE forward + backward in place"], None, SMALL, 20)
    assert alone.eager is alone.ratio is None
    assert alone.notes == ()


@on_interpreter
def test_clocks_are_warm_before_the_first_sample() -> None:
    """Ours and torch's alike: 0.2 s of work on the device come before the samples."""
    ours, torch = IdleDevice(), FakeTorch("torch")
    theirs = IdleDevice()
    theirs.baseline = lambda *_: lambda: None  # type: ignore[attr-defined]
    torch.TorchDevice = lambda: theirs  # type: ignore[assignment,misc,method-assign]
    measure_row(ours, ROWS["RMSNorm forward"], None, SMALL, 20)
    assert sum(ours.timed[:-20]) >= 0.2
    measure_row(IdleDevice(), ROWS["RMSNorm forward"], torch, SMALL, 20)
    assert sum(theirs.timed[-20:]) == pytest.approx(20 * 334 * 3e-6)
    eager = len(theirs.timed) // 2  # then compiled
    assert sum(theirs.timed[: eager - 20]) >= 0.2
    assert sum(theirs.timed[eager:-20]) >= 0.2


def test_baselines_are_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert baselines(tmp_path / "torch_baselines.py") == (
        None,
        "torch_baselines.py is not there: run from a checkout",
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert baselines() == (None, "torch is not installed")


def test_every_row_has_a_baseline() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make oracle")
    module, version = baselines()
    assert module is not None
    assert version == torch.__version__
    assert list(module.BASELINES) == list(ROWS)


@pytest.mark.parametrize("name", TESTED)
def test_baselines_compute_the_same(name: str) -> None:
    """On the CPU, eager: a baseline that does less than we do would be no baseline."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make oracle")
    module, _ = baselines()
    assert module is not None
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module, "TOP_K", SMALL.top_k)
    monkey.setattr(module, "ROTATED", SMALL.rotated)
    monkey.setattr(module, "GROUPS", SMALL.groups)
    monkey.setattr(module, "KEEP_GROUPS", SMALL.keep_groups)
    row = ROWS[name]
    work = row.make(Maker(Recorder(InterpreterLaunch()), np, SMALL, np.dtype(np.float32), 1))
    tensors = [torch.from_numpy(np.ascontiguousarray(x).copy()) for x in work.inputs]
    found = module.BASELINES[name](module.eager, *tensors)()
    ours = work.run()
    if name == "AdamW step":
        return _adamw_baseline(module, torch, work)
    ours = {  # of all that we compute, what the baseline does
        "RMSNorm forward": lambda y: (y[0],),
        "RoPE forward": lambda y: (y[0],),
        "SwiGLU forward": lambda y: (y[0],),
        "attention forward, 1k": lambda y: (y[0],),
        "gate top-k": lambda y: (y.weights, y.indices),
        "CE forward + backward in place": lambda y: (y[1],),
        "GRPO from log-probabilities": lambda y: (y[1].dlog_prob,),
        "head + CE": lambda y: y[1:],
    }.get(name, lambda y: y)(ours)
    found = found if isinstance(found, tuple) else (found,)
    ours = ours if isinstance(ours, tuple) else (ours,)
    assert len(found) == len(ours)
    for theirs, x in zip(found, ours, strict=True):
        wanted = np.asarray(x, np.float64)
        if name.startswith(("attention backward", "MoE layer")):  # of some rows little is left
            theirs, wanted = theirs.reshape(1, -1), wanted.reshape(1, -1)
        assert worst_error(theirs.numpy(), wanted) <= 1e-5, name
    monkey.undo()


def test_ways_of_a_baseline_are_one_function() -> None:
    """Of those among which the fastest is taken, all that run on a CPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make oracle")
    module, _ = baselines()
    assert module is not None
    q, cache = torch.randn(2, 1, 3, 576), torch.randn(2, 5, 1, 576)
    assert torch.allclose(module.decode(q, cache), module.sdpa_decode(q, cache), atol=1e-5)
    q, k, v = (torch.randn(1, 5, 2, width) for width in (192, 192, 128))
    p = torch.einsum("bthx,bshx->bhts", q, k) * 192**-0.5
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    o = torch.einsum("bhts,bshv->bthv", p.masked_fill(hidden, float("-inf")).softmax(-1), v)
    assert torch.allclose(module.padded_attention(q, k, v), o, atol=1e-5)
    with pytest.raises(RuntimeError, match="kernel"):
        module.cudnn_attention(q, k, v)
    assert set(module.NOT_COMPILED) < set(ROWS)


def test_baselines_make_no_large_array_that_they_need_not() -> None:
    """Eager, each array made is a pass over memory: decoding makes its scores and their softmax,
    experts no float32 row of each slot."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make oracle")
    from torch.utils._python_dispatch import TorchDispatchMode

    module, _ = baselines()
    assert module is not None
    made: list[Any] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, _: Any, args: Any = (), more: Any = None
        ) -> Any:
            made.append(function(*args, **(more or {})))
            return made[-1]

    def arrays(call: Any, *inputs: Any) -> list[Any]:
        made.clear()
        with Noted():
            call(*inputs)
        return [*{x.data_ptr(): x for x in made if isinstance(x, torch.Tensor)}.values()]

    half = torch.bfloat16
    q, cache = torch.randn(2, 1, 3, 576, dtype=half), torch.randn(2, 50, 1, 576, dtype=half)
    assert [tuple(x.shape) for x in arrays(module.decode, q, cache)].count((2, 3, 50)) == 2
    tokens, top_k = 4, 2
    d, f = 16, 8
    x, weights = torch.randn(tokens, d, dtype=half), torch.rand(tokens, top_k)
    w = [torch.randn(2, *shape, dtype=half) for shape in ((f, d), (f, d), (d, f))]
    where, start = torch.arange(tokens * top_k), torch.tensor([0, 4, 8])
    rows = [
        x.dtype
        for x in arrays(module.experts, x, weights, *w, where, where, start)
        if x.numel() == tokens * top_k * d
    ]
    assert set(rows) == {half}


def _adamw_baseline(module: Any, torch: Any, work: Any) -> None:
    """The formula that is compiled is a third step of the optimizer that is fused, from zero
    moments."""
    p, g = (torch.from_numpy(x.astype(np.float64)) for x in work.inputs)
    m = torch.zeros_like(p)
    v = torch.zeros_like(p)
    q = p.clone()
    module.adamw(q, g, m, v)
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8)
    optimizer.state[p] = {"step": torch.tensor(2.0), "exp_avg": 0 * p, "exp_avg_sq": 0 * p}
    p.grad = g
    optimizer.step()
    assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_baselines_lie_outside_the_package() -> None:
    assert BASELINES == ROOT / "benchmarks" / "torch_baselines.py"
    assert BASELINES.is_file()


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked if a tracked file changed, of all folders or of those that are asked about."""
    monkeypatch.setattr(run, "SOURCE", tmp_path / "kernels")
    assert commit_of_checkout() == "unknown"

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    for name in ("kernels", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    clean = commit_of_checkout()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "docs" / "a").write_text("b")
    (tmp_path / "kernels" / "new").write_text("b")
    assert commit_of_checkout() == commit_of_checkout("docs") == f"{clean}-dirty"
    assert commit_of_checkout("kernels") == clean


def test_header_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels may have come from elsewhere: the run says that no compiler is here."""
    device = types.SimpleNamespace(
        name="Fake GPU",
        driver=lambda: "580.1",
        versions=lambda: {"CuPy": "14.2"},
        ceilings=lambda: (3e12, 8e14),
        cache=1,
    )
    assert header(device, None, "0123abc").versions["NVRTC"].startswith("13.0")

    def missing() -> str:
        raise CouldNotRun("CUDA C needs NVRTC")

    monkeypatch.setattr("refimpl.bench.run.nvrtc_version", missing)
    found = header(device, "2.13.0", "0123abc")
    assert (found.versions["NVRTC"], found.versions["torch"]) == ("none", "2.13.0")
