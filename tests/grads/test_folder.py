"""A folder of results: killed and resumed, another request refused, broken records, locks."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from refimpl.checkpoint.source import MemorySource
from refimpl.checkpoint.tensor_file import write_tensor_file
from refimpl.errors import CouldNotRun
from refimpl.grads import Request, Result, write_gradients
from refimpl.grads.folder import read_record
from refimpl.model import Route, forward

from grads.examples import TINY, TOKENS, read, stream
from random_parameters import random_parameters
from support import FULL, ROOT

CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
from grads.examples import TINY, TOKENS
from random_parameters import random_parameters
import refimpl.checkpoint.tensor_file as tensor_file
from refimpl.checkpoint.source import MemorySource
from refimpl.grads import Request, write_gradients

left, write = {writes}, tensor_file.TensorWriter.write

def until(self, *args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *args)

tensor_file.TensorWriter.write = until
request = Request(TOKENS, mtp=True, balance_alpha=0.01, activations="*")
write_gradients(MemorySource(random_parameters(TINY), TINY), request, Path({out!r}))
"""


def run_child(out: Path, writes: int) -> int:
    """The whole loss of tiny in a process of its own, killed when it would write one tensor more
    than ``writes``."""
    code = CHILD.format(tests=str(ROOT / "tests"), writes=writes, out=str(out))
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


def test_killed_and_resumed(tmp_path: Path) -> None:
    """Killed over and over in the middle of a file, each time as soon; what is done stays, and all
    is as of one run."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    stream(random_parameters(TINY), TINY, whole, mtp=True, balance_alpha=0.01, activations="*")
    done: dict[Path, int] = {}
    for writes in (0, 5, *((50,) * 5 if FULL else (110,) * 2)):  # of 262
        assert run_child(out, writes) == -signal.SIGKILL
        assert not (out / "index.json").exists()
        assert all(path.stat().st_mtime_ns == time for path, time in done.items())
        records = list((out / "unfinished").glob("*.safetensors"))
        made = [out / file for path in records for file in read_record(path).files]
        assert writes < 50 or len(made) > len(done)
        done = {path: path.stat().st_mtime_ns for path in made}
    assert {path.name for path in done} >= {"grad-head.safetensors", "grad-norm.safetensors"}
    with pytest.raises(
        CouldNotRun, match="holds an unfinished run of another request \\(other mtp\\)"
    ):
        stream(random_parameters(TINY), TINY, out, balance_alpha=0.01, activations="*")
    assert run_child(out, 10**9) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_at_every_step(tied: bool, tmp_path: Path) -> None:
    """Interrupted at the beginning of every step in turn, what is left is as of one run."""
    config = replace(TINY, tied=tied)
    source = MemorySource(random_parameters(config), config)
    request = Request(TOKENS, mtp=True, balance_alpha=0.01, activations="*")
    order: list[str] = []
    write_gradients(
        source, request, tmp_path / "whole", progress=lambda step, done, total: order.append(step)
    )
    assert len(order) == 14 + 1  # and "done"
    for stopped in order[1:]:

        def stop(step: str, done: int, total: int, stopped: str = stopped) -> None:
            if step == stopped:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_gradients(source, request, tmp_path / "out", progress=stop)
    write_gradients(source, request, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_another_request_is_refused(tmp_path: Path) -> None:
    """Each part of the request, and the checkpoint, tells an unfinished run from another; --force
    starts anew."""
    params, config = random_parameters(TINY), TINY
    mask = np.ones_like(TOKENS, dtype=bool)
    mask[:, -1] = False
    routes = {
        layer: Route(r.indices, None)
        for layer, r in forward(params, TOKENS, config)[0].routes.items()
    }

    class Stop(Exception):
        pass

    def stop(step: str, done: int, total: int) -> None:
        if done == 2:
            raise Stop

    source = MemorySource(params, config)
    with pytest.raises(Stop):
        write_gradients(source, Request(TOKENS), tmp_path, progress=stop)
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for part, other in {
        "tokens": Request(TOKENS + 1 - 2 * (TOKENS == 255)),
        "mask": Request(TOKENS, mask=mask),
        "layers": Request(TOKENS, layers=2),
        "only": Request(TOKENS, only="model.*"),
        "routes": Request(TOKENS, routes=routes),
    }.items():
        with pytest.raises(CouldNotRun, match=rf"another request \(other {part}\)"):
            write_gradients(source, other, tmp_path)
    with pytest.raises(CouldNotRun, match=r"\(other checkpoint\)"):
        write_gradients(source, Request(TOKENS), tmp_path, checkpoint="another")
    single = MemorySource({n: p.astype(np.float32) for n, p in params.items()}, config)
    with pytest.raises(CouldNotRun, match=r"\(other dtype\)"):
        write_gradients(single, Request(TOKENS), tmp_path)
    assert left == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_gradients(single, Request(TOKENS), tmp_path, force=True)
    assert read(tmp_path)["grad/model.norm.weight"].dtype == np.float32


def unfinished(out: Path) -> Callable[..., Result]:
    """Leave a run that stopped when its first backward was done; the function resumes it."""
    source, request = MemorySource(random_parameters(TINY), TINY), Request(TOKENS, activations="*")

    def stop(step: str, done: int, total: int) -> None:
        if step == "backward 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gradients(source, request, out, progress=stop)
    return partial(write_gradients, source, request, out)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000], ids=range(5))
def test_a_broken_state(content: bytes, tmp_path: Path) -> None:
    """What a full disk or an editor makes of the record of the request: --force is the way out, and
    works."""
    resume = unfinished(tmp_path)
    (tmp_path / "unfinished" / "request.json").write_bytes(content)
    with pytest.raises(
        CouldNotRun, match=r"unfinished/request.json is broken: start anew with force$"
    ):
        resume()
    resume(force=True)
    assert (tmp_path / "index.json").exists()


@pytest.mark.parametrize("file", ["act-layer-00001", "cot-norm", "grad-layer-00002", "logits"])
def test_a_file_of_a_finished_step(file: str, tmp_path: Path) -> None:
    """Gone or cut off, it can't be made again by going on: no index names it."""
    resume = unfinished(tmp_path)
    path = tmp_path / f"{file}.safetensors"
    data = path.read_bytes()
    for change in (lambda: path.write_bytes(data[:-1]), path.unlink):
        change()
        with pytest.raises(
            CouldNotRun, match=rf"{path.name} is gone or changed since .*: start anew with force$"
        ):
            resume()
        assert not (tmp_path / "index.json").exists()
    path.write_bytes(data)
    resume()
    assert f"{file}.safetensors" in {entry.name for entry in tmp_path.iterdir()}
    assert read(tmp_path)


def test_a_record_without_notes(tmp_path: Path) -> None:
    """As another program or an older version leaves it."""
    resume = unfinished(tmp_path)
    write_tensor_file(tmp_path / "unfinished" / "head.safetensors", {"x": np.zeros(3)})
    with pytest.raises(CouldNotRun, match=r"head.safetensors is broken: start anew with force$"):
        resume()
    write_tensor_file(
        tmp_path / "unfinished" / "head.safetensors", {"x": np.zeros(3)}, {"notes": '{"files": {}}'}
    )
    with pytest.raises(
        CouldNotRun, match=r"head.safetensors is not as this version writes it: start anew with"
    ):
        resume()


def test_a_finished_result_stays(tmp_path: Path) -> None:
    """Nothing is overwritten without force, nor beside foreign files even with it."""
    params = random_parameters(TINY)
    source = MemorySource(params, TINY)
    write_gradients(source, Request(TOKENS), tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    (tmp_path / "unfinished").mkdir()  # as a kill at the very end leaves it
    with pytest.raises(CouldNotRun, match="holds a finished result"):
        write_gradients(source, Request(TOKENS), tmp_path)
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()
    }
    write_gradients(source, Request(TOKENS, only="lm_head.*"), tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.glob("grad-*")) == ["grad-head.safetensors"]
    (tmp_path / "thesis.tex").write_text("all of it")
    for force in (False, True):
        with pytest.raises(CouldNotRun, match=r"holds other things \(thesis.tex\)"):
            write_gradients(source, Request(TOKENS), tmp_path, force=force)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
    assert (tmp_path / "index.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_one_run_at_a_time(force: bool, tmp_path: Path) -> None:
    """While a run works in a folder, another is refused and changes nothing, even by force; then
    the folder is free."""
    out, refused = tmp_path / "out", []
    source = MemorySource(random_parameters(TINY), TINY)
    other = partial(write_gradients, source, Request(TOKENS, only="model.norm.*"), out)

    def meanwhile(step: str, done: int, total: int) -> None:
        if done < total:
            with pytest.raises(CouldNotRun) as error:
                other(force=force)
            refused.append(str(error.value))

    write_gradients(source, Request(TOKENS), out, progress=meanwhile)
    assert set(refused) == {f"{out} is in use by another run"}
    stream(random_parameters(TINY), TINY, tmp_path / "alone")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()
    }
    other(force=True)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Another process's folder can't be used while it lives, and can once it was killed."""
    code = "import sys, time; from pathlib import Path; from refimpl.grads.folder import held\n"
    code += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(CouldNotRun, match="is in use by another run"):
            stream(random_parameters(TINY), TINY, tmp_path)
        child.kill()
    stream(random_parameters(TINY), TINY, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "out.safetensors"
