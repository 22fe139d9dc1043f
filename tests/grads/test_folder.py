"""A folder of results: killed and resumed, another request refused, broken records, locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
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
from refimpl.files import file_digest
from refimpl.grads import Request, Result, write_gradients
from refimpl.grads import folder as grads_folder
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
os.fsync = lambda descriptor: None
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


def test_a_long_request_is_told_by_all_of_it() -> None:
    """NumPy prints the ends alone of more than 1000 numbers: a change in the middle counts too."""
    source = MemorySource(random_parameters(TINY), TINY)
    tokens = np.zeros((1, 3000), int)
    before = Request(tokens).fingerprint(source, "")
    tokens = tokens.copy()
    tokens[0, 1500] = 1
    after = Request(tokens).fingerprint(source, "")
    assert [name for name in before if before[name] != after[name]] == ["tokens"]


def test_routes_in_another_order_are_the_same_request() -> None:
    source = MemorySource(random_parameters(TINY), TINY)
    routes = forward(source.params, TOKENS, TINY)[0].routes
    there = Request(TOKENS, routes=routes).fingerprint(source, "")
    assert len(routes) > 1
    routes = dict(reversed(routes.items()))
    assert Request(TOKENS, routes=routes).fingerprint(source, "") == there


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
        CouldNotRun, match=r"unfinished/request.json is broken: start again with force$"
    ):
        resume()
    resume(force=True)
    assert (tmp_path / "index.json").exists()


def zeros(path: Path) -> None:
    """What power that is lost before the disk has a file leaves of it."""
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def other_notes(notes: str) -> Callable[[Path], None]:
    return lambda path: write_tensor_file(path, {"x": np.zeros(3)}, {"notes": notes})


RECORD = "unfinished/backward-00002.safetensors"  # the last
DAMAGES = [
    *((RECORD, change) for change in (zeros, cut, one_bit, Path.unlink)),
    *((RECORD, other_notes(notes)) for notes in ("", "[1]", '{"files": {}}')),
    *(("grad-layer-00002.safetensors", change) for change in (zeros, cut, one_bit, Path.unlink)),
    ("unfinished/head.safetensors", zeros),
    ("logits.safetensors", one_bit),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_step_is_done_again(
    file: str, damage: Callable[[Path], None], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """Whatever a disk does to a record or to a file of its step: resuming does that step and those
    after it again, none before it, and the result is as of one run, bit for bit."""
    resume = unfinished(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    damage(tmp_path / file)
    if (tmp_path / file).exists():  # times are not what it is noticed by
        os.utime(tmp_path / file, ns=(before[tmp_path / file],) * 2)
    resume()
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == whole
    kept = {path for path, time in before.items() if path.exists()}
    kept = {path for path in kept if path.stat().st_mtime_ns == before[path]}
    assert tmp_path / "act-layer-00000.safetensors" in kept
    assert (tmp_path / "logits.safetensors" in kept) == ("00002" in file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the run that `unfinished` interrupts, as they are without interruption."""
    out = tmp_path_factory.mktemp("whole")
    stream(random_parameters(TINY), TINY, out, activations="*")
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_is_said_to_be_there_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a file gets its name it is on the disk; before a record or the index does, so are the
    names of the files that it tells of."""
    told: list[tuple[str, str]] = []
    rename = os.replace

    def fsync(descriptor: int) -> None:
        told.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace_file(source: Path, target: Path) -> None:
        told.append(("rename", str(target)))
        assert ("sync", str(source)) in told[-3:]
        if target.parent.name == "unfinished" or target.name == "index.json":
            named = [place for what, place in told[:-1] if what == "rename"]
            last = max((n for n, entry in enumerate(told[:-1]) if entry[0] == "rename"), default=0)
            assert not named or ("sync", str(Path(told[last][1]).parent)) in told[last:]
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_file)
    stream(random_parameters(TINY), TINY, tmp_path / "out", activations="*")
    renamed = [Path(place).name for what, place in told if what == "rename"]
    assert renamed[0] == "request.json"
    assert renamed[-1] == "index.json"
    assert {"grad-head.safetensors", "head.safetensors", "in.safetensors"} <= set(renamed)
    assert told[-1] == ("sync", str(tmp_path / "out"))
    assert ("sync", str(tmp_path)) in told


@pytest.mark.parametrize("last", [0, 1, 7, 20, 40, 63])
def test_a_full_disk(
    last: int, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That shows when a file is written through: no file is left half, and resuming gives the
    result of one run, bit for bit."""
    left = last

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises((OSError, CouldNotRun), match="No space left on device"):
            stream(random_parameters(TINY), TINY, tmp_path, activations="*")
    assert not (tmp_path / "index.json").exists()
    assert not list(tmp_path.rglob("*.partial"))
    stream(random_parameters(TINY), TINY, tmp_path, activations="*")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_digests_of_the_index(tmp_path: Path) -> None:
    """Every file's size and SHA-256; a result one of whose files has changed is not a finished
    one."""
    source, request = MemorySource(random_parameters(TINY), TINY), Request(TOKENS)
    write_gradients(source, request, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    data = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert index["files"] == {
        name: {"bytes": len(x), "sha256": hashlib.sha256(x).hexdigest()} for name, x in data.items()
    }
    zeros(tmp_path / "grad-norm.safetensors")
    with pytest.raises(CouldNotRun, match=r"grad-norm.safetensors is not as index.json says"):
        write_gradients(source, request, tmp_path)
    (tmp_path / "grad-norm.safetensors").write_bytes(data["grad-norm.safetensors"])
    with pytest.raises(CouldNotRun, match="holds a finished result"):
        write_gradients(source, request, tmp_path)
    for content in ("{}", '{"files": [1]}', '{"files": {"a": {"b": 1}}}', "[", "[]"):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(CouldNotRun, match=r"index.json is broken: start again with force$"):
            write_gradients(source, request, tmp_path)
    write_gradients(source, request, tmp_path, force=True)


def test_asking_again_reads_only_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished result is refused by sizes and times; a file written since the index is read."""
    source, request = MemorySource(random_parameters(TINY), TINY), Request(TOKENS)
    write_gradients(source, request, tmp_path)
    index, norm = tmp_path / "index.json", tmp_path / "grad-norm.safetensors"
    done = index.stat().st_mtime_ns
    for path in tmp_path.glob("*.safetensors"):
        assert path.stat().st_mtime_ns <= done
        os.utime(path, ns=(done - 1, done - 1))
    read: list[str] = []

    def seen(path: Path) -> str:
        read.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(grads_folder, "file_digest", seen)
    with pytest.raises(CouldNotRun, match="holds a finished result"):
        write_gradients(source, request, tmp_path)
    assert read == []
    data = norm.read_bytes()
    zeros(norm)
    os.utime(norm, ns=(done, done))  # in the same tick as the index
    with pytest.raises(CouldNotRun, match=r"grad-norm.safetensors is not as index.json says"):
        write_gradients(source, request, tmp_path)
    assert read == [norm.name]
    norm.write_bytes(data[:-1])
    os.utime(norm, ns=(0, 0))
    with pytest.raises(CouldNotRun, match=r"grad-norm.safetensors is not as index.json says"):
        write_gradients(source, request, tmp_path)
    assert read == [norm.name]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["unfinished", "index.json", "grad-head.safetensors"])
def test_no_link_is_followed(name: str, force: bool, tmp_path: Path) -> None:
    """Nothing outside the folder is written or removed through a link in it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "request.json").write_text("mine")
    (out := tmp_path / "out").mkdir()
    (out / name).symlink_to(elsewhere)
    source = MemorySource(random_parameters(TINY), TINY)
    with pytest.raises(CouldNotRun, match=rf"out holds other things \({name}\)"):
        write_gradients(source, Request(TOKENS), out, force=force)
    assert [path.name for path in elsewhere.iterdir()] == ["request.json"]
    assert (elsewhere / "request.json").read_text() == "mine"


def test_a_pipe_in_the_folder(tmp_path: Path) -> None:
    """It is not waited for."""
    source = MemorySource(random_parameters(TINY), TINY)
    (tmp_path / "unfinished").mkdir()
    os.mkfifo(tmp_path / "unfinished" / "request.json")
    with pytest.raises(CouldNotRun, match=r"request.json can't be read: not a regular file"):
        write_gradients(source, Request(TOKENS), tmp_path)


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
    code = "import sys, time; from pathlib import Path; from refimpl.files import held\n"
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
