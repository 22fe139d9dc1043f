"""A folder of results: killed and resumed, another request refused, broken records, locks."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refimpl.checkpoint.source import MemorySource
from refimpl.checkpoint.tensor_file import write_tensor_file
from refimpl.errors import CouldNotRun
from refimpl.model import Route, forward
from refimpl.streaming import Request, Stream
from refimpl.streaming.folder import Record

from grads.examples import TINY, TOKENS, parameters, read, stream
from support import FULL, ROOT

CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
from grads.examples import TINY, TOKENS, parameters
import refimpl.checkpoint.tensor_file as tensor_file
from refimpl.checkpoint.source import MemorySource
from refimpl.streaming import Request, Stream

left, write = {writes}, tensor_file.TensorWriter.write

def until(self, *args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *args)

tensor_file.TensorWriter.write = until
request = Request(TOKENS, mtp=True, balance_alpha=0.01, activations="*")
Stream(MemorySource(parameters(TINY), TINY), request).write(Path({out!r}))
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
    stream(parameters(TINY), TINY, whole, mtp=True, balance_alpha=0.01, activations="*")
    done: dict[Path, int] = {}
    for writes in (0, 5, *((50,) * 5 if FULL else (110,) * 2)):  # of 262
        assert run_child(out, writes) == -signal.SIGKILL
        assert not (out / "index.json").exists()
        assert all(path.stat().st_mtime_ns == time for path, time in done.items())
        records = list((out / "unfinished").glob("*.safetensors"))
        made = [out / file for path in records for file in Record(path).files]
        assert writes < 50 or len(made) > len(done)
        done = {path: path.stat().st_mtime_ns for path in made}
    assert {path.name for path in done} >= {"grad-head.safetensors", "grad-norm.safetensors"}
    with pytest.raises(
        CouldNotRun, match="holds an unfinished run of another request \\(other mtp\\)"
    ):
        stream(parameters(TINY), TINY, out, balance_alpha=0.01, activations="*")
    assert run_child(out, 10**9) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_another_request_is_refused(tmp_path: Path) -> None:
    """Each part of the request, and the checkpoint, tells an unfinished run from another; --force
    starts anew."""
    params, config = parameters(TINY), TINY
    mask = np.ones_like(TOKENS, dtype=bool)
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
        Stream(source, Request(TOKENS)).write(tmp_path, progress=stop)
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for part, other in {
        "tokens": Request(TOKENS + 1 - 2 * (TOKENS == 255)),
        "mask": Request(TOKENS, mask=mask),
        "layers": Request(TOKENS, layers=2),
        "only": Request(TOKENS, only="model.*"),
        "routes": Request(TOKENS, routes=routes),
    }.items():
        with pytest.raises(CouldNotRun, match=rf"another request \(other {part}\)"):
            Stream(source, other).write(tmp_path)
    with pytest.raises(CouldNotRun, match=r"\(other checkpoint\)"):
        Stream(source, Request(TOKENS)).write(tmp_path, checkpoint="another")
    single = MemorySource({n: p.astype(np.float32) for n, p in params.items()}, config)
    with pytest.raises(CouldNotRun, match=r"\(other dtype\)"):
        Stream(single, Request(TOKENS)).write(tmp_path)
    assert left == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    Stream(single, Request(TOKENS)).write(tmp_path, force=True)
    assert read(tmp_path)["grad/model.norm.weight"].dtype == np.float32


def unfinished(out: Path) -> Stream:
    """A run that stopped when its first backward was done, and the stream that may go on."""
    whole = Stream(MemorySource(parameters(TINY), TINY), Request(TOKENS, activations="*"))

    def stop(step: str, done: int, total: int) -> None:
        if step == "backward-00001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole.write(out, progress=stop)
    return whole


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000], ids=range(5))
def test_a_broken_state(content: bytes, tmp_path: Path) -> None:
    """What a full disk or an editor makes of the record of the request: --force is the way out, and
    works."""
    whole = unfinished(tmp_path)
    (tmp_path / "unfinished" / "request.json").write_bytes(content)
    with pytest.raises(
        CouldNotRun, match=r"unfinished/request.json is broken: start anew with --force$"
    ):
        whole.write(tmp_path)
    whole.write(tmp_path, force=True)
    assert (tmp_path / "index.json").exists()


@pytest.mark.parametrize("file", ["act-layer-00001", "cot-norm", "grad-layer-00002", "logits"])
def test_a_file_of_a_finished_step(file: str, tmp_path: Path) -> None:
    """Gone or cut off, it can't be made again by going on: no index names it."""
    whole = unfinished(tmp_path)
    path = tmp_path / f"{file}.safetensors"
    data = path.read_bytes()
    for change in (lambda: path.write_bytes(data[:-1]), path.unlink):
        change()
        with pytest.raises(
            CouldNotRun, match=rf"{path.name} is gone or changed since .*: start anew with --force$"
        ):
            whole.write(tmp_path)
        assert not (tmp_path / "index.json").exists()
    path.write_bytes(data)
    whole.write(tmp_path)
    assert f"{file}.safetensors" in {entry.name for entry in tmp_path.iterdir()}
    assert read(tmp_path)


def test_a_record_without_notes(tmp_path: Path) -> None:
    """As another program or an older version leaves it."""
    whole = unfinished(tmp_path)
    write_tensor_file(
        tmp_path / "unfinished" / "head.safetensors", tmp_path / "new", {"x": np.zeros(3)}
    )
    with pytest.raises(CouldNotRun, match=r"head.safetensors is broken: start anew with --force$"):
        whole.write(tmp_path)
    write_tensor_file(
        tmp_path / "unfinished" / "head.safetensors",
        tmp_path / "new",
        {"x": np.zeros(3)},
        {"notes": '{"files": {}}'},
    )
    with pytest.raises(
        CouldNotRun, match=r"head.safetensors is not as this version writes it: start anew with"
    ):
        whole.write(tmp_path)


def test_a_finished_result_stays(tmp_path: Path) -> None:
    """Nothing is overwritten without force, nor beside foreign files even with it."""
    params = parameters(TINY)
    source = MemorySource(params, TINY)
    Stream(source, Request(TOKENS)).write(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    (tmp_path / "unfinished").mkdir()  # as a kill at the very end leaves it
    with pytest.raises(CouldNotRun, match="holds a finished result"):
        Stream(source, Request(TOKENS)).write(tmp_path)
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()
    }
    Stream(source, Request(TOKENS, only="lm_head.*")).write(tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.glob("grad-*")) == ["grad-head.safetensors"]
    (tmp_path / "thesis.tex").write_text("all of it")
    for force in (False, True):
        with pytest.raises(CouldNotRun, match=r"holds other things \(thesis.tex\)"):
            Stream(source, Request(TOKENS)).write(tmp_path, force=force)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
    assert (tmp_path / "index.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_one_run_at_a_time(force: bool, tmp_path: Path) -> None:
    """While a run works in a folder, another is refused and changes nothing, even by force; then
    the folder is free."""
    out, refused = tmp_path / "out", []
    other = Stream(MemorySource(parameters(TINY), TINY), Request(TOKENS, only="model.norm.*"))

    def meanwhile(step: str, done: int, total: int) -> None:
        if done < total:
            with pytest.raises(CouldNotRun) as error:
                other.write(out, force=force)
            refused.append(str(error.value))

    Stream(MemorySource(parameters(TINY), TINY), Request(TOKENS)).write(out, progress=meanwhile)
    assert set(refused) == {f"{out} is in use by another run"}
    stream(parameters(TINY), TINY, tmp_path / "alone")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()
    }
    other.write(out, force=True)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Another process's folder can't be used while it lives, and can once it was killed."""
    code = "import sys, time; from pathlib import Path; from refimpl.streaming.folder import held\n"
    code += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(CouldNotRun, match="is in use by another run"):
            stream(parameters(TINY), TINY, tmp_path)
        child.kill()
    stream(parameters(TINY), TINY, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "out.safetensors"
