"""``refimpl verify`` and ``refimpl grade`` as a user meets them: output, exit codes, and one clear
line for what could not run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from refimpl.check.planted import PLANTED, plant
from refimpl.ops import REFERENCE, Op

from kernel_support.on_cupy import use_cuda
from support import Done, refimpl_here, refimpl_process

SAMPLE = (
    "It was a bright cold day in November, and all the gradients were striking thirteen digits. "
    * 3
)


def test_verify_some_ops() -> None:
    """In a process of its own, as a user starts it."""
    done = refimpl_process("verify", "rope", "rms_norm", "--examples", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert re.search(r"text: pydoc_data.topics of CPython .*, sha256 [0-9a-f]{64}$", lines[1])
    assert re.match(r"op +tensor +shape +difference +noise +sharpness +digits +verdict", lines[2])
    assert [line.split()[0] for line in lines[3:6]] == ["rms_norm", "w", "rope"]  # in reading order
    assert re.search(r"3 tensors, \d+ examples, .* s: every gradient holds", lines[-1])


def test_verify_with_everything(tmp_path: Path) -> None:
    """Own text, digits, another implementation, and a JSON file with what the table shows."""
    text, out = tmp_path / "sample.txt", tmp_path / "result.json"
    text.write_text(SAMPLE)
    done = refimpl_here(
        "verify",
        "attention",
        "--text",
        str(text),
        "--digits",
        "50",
        "--implementation",
        "flash",
        "--seed",
        "7",
        "--examples",
        "1",
        "--json",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["ok"] is True
    assert result["settings"]["implementation"] == "flash"
    assert result["text"]["name"] == str(text)
    assert [t["tensor"] for t in result["tensors"]] == ["q", "k", "v"]
    assert all(
        t["digits"] >= 40 and t["difference"] <= 1e-8 and t["noise"] <= 1 for t in result["tensors"]
    )
    assert list(tmp_path.iterdir()) in ([text, out], [out, text])  # no temporary file is left


def test_numba_cpu(tmp_path: Path) -> None:
    """What has no wide numbers runs beside the reference; all rules hold, exact arithmetic too."""
    pytest.importorskip("numba")
    out = tmp_path / "result.json"
    how = "--implementation", "numba_cpu", "--examples", "1", "--digits", "30", "--json", out
    done = refimpl_here("verify", "swiglu", "ffn", "mla", *how)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["settings"]["implementation"] == "numba_cpu"
    for t in result["tensors"]:
        assert t["digits"] >= 20
        assert t["difference"] <= 1e-8
        assert t["noise"] <= 1


def test_narrow_terminal_cuts_no_number() -> None:
    """On 80 columns the table's lines wrap; no cell ends in an ellipsis. Rows of 0.0, those of the
    MTP module under GRPO, are explained."""
    import pty

    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "refimpl", "verify", "rope", "model_grpo", "--dtype", "float32"],
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert process.wait() == 0
    assert b"PASS" in shown
    assert max(map(len, shown.splitlines())) > 80
    assert "…".encode() not in shown
    assert len(re.findall(rb"0\.0e\+00 +0\.0e\+00", shown)) == 20
    assert b"the 20 rows of 0.0 in model_grpo are its MTP module's: GRPO has no MTP" in shown


def test_a_pipe_gets_the_rows_of_an_op_when_it_is_done() -> None:
    """Long before the last: whoever reads them sees that it moves, and what was found if it is
    stopped."""
    command = ["-m", "refimpl", "verify", "rms_norm", "swiglu", "mla", "--examples", "20"]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(5)]
    assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    assert [line.split()[0] for line in lines[2:]] == ["op", "rms_norm", "w"]


def test_float32() -> None:
    done = refimpl_here("verify", "swiglu", "--dtype", "float32", "--examples", "1")
    assert done.returncode == 0
    assert re.search(r"gate +\S+ +– ", done.stdout)


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through kernels, under the interpreter: outputs have rows too, noise and sharpness the bounds
    of the rule; an op that bfloat16 does not reach is refused."""
    use_cuda(monkeypatch)
    given = "--backend", "cupy", "--implementation", "cuda", "--dtype", "bfloat16"
    done = refimpl_here("verify", "rms_norm", "ffn", *given, "--examples", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[3:]]
    assert rows[0][:2] == ["rms_norm", "output"]
    assert [row[0] for row in rows[1:4]] == ["x", "w", "ffn"]
    noise, sharpness = map(float, rows[1][3:5])
    assert 0 < noise < 1
    assert 2.0**-8 < sharpness < 2.0**-6
    done = refimpl_here("verify", "flash_attention", *given)
    assert done.returncode == 2
    assert done.stderr.startswith("refimpl: unknown op flash_attention in bfloat16; there are ")


def test_the_same_seed_gives_the_same_table() -> None:
    first, second = (
        refimpl_here("verify", "router", "--examples", "1").stdout.splitlines()[:-1]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "rmsnorm"], "unknown op rmsnorm; there are linear, embedding, "),
        (
            ["verify", "--text", "missing.txt"],
            "--text missing.txt can't be read: No such file or directory",
        ),
        (["verify", "--text", "empty.txt"], "--text empty.txt must hold at least 64 bytes, got 0"),
        (["verify", "--text", "."], "--text . can't be read: Is a directory"),
        (["verify", "--backend", "tpu"], "--backend must be one of numpy, cupy, got tpu"),
        (
            ["verify", "--implementation", "magic"],
            "--implementation must be one of reference, flash, absorbed, numba_cpu, cuda, "
            "numba_cuda, got magic",
        ),
        (
            ["verify", "--convention", "mine"],
            "--convention must be one of official, paper, hf, got mine",
        ),
        (
            ["verify", "--dtype", "bfloat16"],
            "--dtype bfloat16 needs the implementation cuda and the backend cupy, got the "
            "implementation reference",
        ),
        (["verify", "--examples", "0"], "--examples must be at least 1, got 0"),
        (["verify", "--model-examples", "0"], "--model-examples must be at least 1, got 0"),
        (
            ["verify", "--implementation", "cuda"],
            "--backend must be cupy for the implementation cuda, got numpy",
        ),
        (
            ["verify", "--implementation", "numba_cpu", "--backend", "cupy"],
            "--backend must be numpy for the implementation numba_cpu, got cupy",
        ),
        (["verify", "--digits", "5"], "--digits must lie in 20…1000, got 5"),
        (["verify", "linear", "--json", "no/such/file"], "--json no/such/file can't be written"),
        (["verify", "linear", "--json", "."], "--json . can't be written"),
        (
            ["verify", "linear", "--json", os.devnull],
            f"--json {os.devnull} can't be written: not a regular file",
        ),
        (["verify", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (
            ["verify", "embedding", "--text", "dull.txt"],
            "dull.txt must hold at least 16 different bytes, got 1",
        ),
        (["grade", "rms_norm", "missing.py"], "missing.py is not a file"),
        (["grade", "rms_norm", "empty.txt"], "empty.txt must be a Python file (.py)"),
        (["grade", "nothing", "mine.py"], "unknown op nothing; there are linear"),
        (["grade", "rms_norm", "mine.py"], "mine.py must define rms_norm_backward(dy, saved)"),
        (["grade", "rms_norm", "broken.py"], "broken.py can't be imported: SyntaxError"),
        (["grade", "rms_norm", "leaves.py"], "leaves.py can't be imported: SystemExit"),
        (["grade", "rms_norm", "built.so"], "built.so must be a Python file (.py)"),
        (["grade", "rms_norm", "n" * 300], "nnn is not a file"),
        (["grade", "rms_norm", "large.py"], "large.py must hold at most 25,000,000 bytes, got"),
        (["verify", "--text", "/dev/zero"], "--text /dev/zero can't be read: not a regular file"),
        (["verify", "--text", "pipe"], "--text pipe can't be read: not a regular file"),
        (["grade", "rms_norm", "number.py"], "number.py must define rms_norm_backward(dy, saved)"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_could_not_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    """One line on standard error, exit code 2, and no traceback."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "built.so").write_bytes(b"\x7fELF")
    (tmp_path / "large.py").touch()
    os.truncate(tmp_path / "large.py", 2**32)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dull.txt").write_bytes(b"\x00" * 100)
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "number.py").write_text("rms_norm_backward = 1\n")
    done = refimpl_here(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("refimpl: ")
    assert done.stderr.count("\n") == 1


def test_no_gpu() -> None:
    """Without CuPy or a device, asking for it is one clear line; with both, this is the place to
    see it hold."""
    done = refimpl_here("verify", "linear", "--backend", "cupy", "--examples", "1")
    if done.returncode == 0:
        pytest.skip("a GPU is here: make gpu checks it")
    assert done.returncode == 2
    assert re.fullmatch(r"refimpl: --backend cupy needs (CuPy|a GPU).*\n", done.stderr)


RIGHT = """
def rms_norm_backward(dy, saved):
    x, w, r = saved
    n, dn = x * r, dy * w
    dx = r * (dn - n * (dn * n).mean(axis=-1, keepdims=True))
    return dx, (dy * n).reshape(-1, x.shape[-1]).sum(axis=0)
"""


def test_grade(tmp_path: Path) -> None:
    """A right backward passes; one without the mean term fails, and its tensor is named."""
    mine = tmp_path / "mine.py"
    mine.write_text(RIGHT)
    assert refimpl_here("grade", "rms_norm", str(mine)).returncode == 0
    mine.write_text(RIGHT.replace("dn - n * (dn * n).mean(axis=-1, keepdims=True)", "dn"))
    done = refimpl_here("grade", "rms_norm", str(mine))
    assert done.returncode == 1
    assert "FAIL rms_norm x: finite-difference error" in done.stdout
    assert "\ndx: see (rms_norm.4) in derivations/rms_norm.md\n" in done.stdout
    assert "FAIL rms_norm w" not in done.stdout
    assert "\ndw: see" not in done.stdout
    mine.write_text("def rms_norm_backward(dy, saved):\n    return dy\n")
    done = refimpl_here("grade", "rms_norm", str(mine))
    assert done.returncode == 1
    assert "backward must return 2 gradients" in done.stdout
    mine.write_text("def rms_norm_backward(dy, saved):\n    return dy[99], dy\n")
    done = refimpl_here("grade", "rms_norm", str(mine))
    assert done.returncode == 1
    assert "IndexError" in done.stdout
    assert "Traceback" not in done.stderr
    for left in ("SystemExit(0)", "SystemExit", "GeneratorExit", "BaseException('x')"):
        mine.write_text(f"def rms_norm_backward(dy, saved):\n    raise {left}\n")
        done = refimpl_here("grade", "rms_norm", str(mine))
        assert done.returncode == 1
        assert f"rms_norm raised {left.split('(')[0]} at mine.py:2" in done.stdout


GRPO = """
def grpo_backward(dy, saved):
    def back(level, g):
        if level == "token":
            return g
        total = g.sum(axis=1, keepdims=True) + 0 * g
        return total / saved.count if level == "sequence_mean" else total

    d = back(saved.ratio, saved.dz)
    if saved.du is not None:
        d = d - back(saved.kl_level, saved.du)
    return dy[0] * saved.mask * d
"""


def test_grade_says_which_examples_fail(tmp_path: Path) -> None:
    """The mean's missing 1/n shows under one ratio alone, a missing factor everywhere."""
    mine = tmp_path / "mine.py"
    mine.write_text(GRPO)
    done = refimpl_here("grade", "grpo", str(mine))
    assert done.returncode == 0
    assert "it fails" not in done.stdout
    mine.write_text(GRPO.replace("total / saved.count if", "total if"))
    done = refimpl_here("grade", "grpo", str(mine))
    assert done.returncode == 1
    assert " examples; these have ratio_sequence_mean, as have " in done.stdout
    mine.write_text(GRPO.replace("dy[0] *", "2 * dy[0] *"))
    done = refimpl_here("grade", "grpo", str(mine))
    every = re.search(r"^it fails in (\d+) of (\d+) examples$", done.stdout, re.M)
    assert every
    assert every[1] == every[2]


def test_a_broken_op_fails_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if somebody had edited the file: exit code 1, and the tensor in words."""
    from typer.testing import CliRunner

    from refimpl.cli import app

    broken = plant(next(bug for bug in PLANTED if bug.name == "no mean term"))
    assert isinstance(broken, Op)
    table = REFERENCE | {"rms_norm": broken}
    monkeypatch.setattr("refimpl.verify.table_of", lambda implementation: table)
    result = CliRunner().invoke(app, ["verify", "rms_norm", "--examples", "1"])
    assert result.exit_code == 1
    assert "FAIL rms_norm x" in result.stdout


TABLE = """
import numpy as np
from refimpl.ops import rms_norm_forward, swiglu_backward, swiglu_forward

def rms_norm(x, w, *, eps):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(eps))
    return w * x * r, (x, w, r)

def rms_norm_backward(dy, saved):
    x, w, r = saved
    n, dn = x * r, dy * w
    return r * (dn - n * (dn * n).mean(-1, keepdims=True)), (dy * n).sum((0, 1))

ops = {"rms_norm": (rms_norm, rms_norm_backward), "swiglu": (swiglu_forward, swiglu_backward),
       "array": np.from_dlpack}
wrong = {"rms_norm": (rms_norm, lambda dy, s: (rms_norm_backward(dy, s)[0], dy.sum((0, 1))))}
raising = {"rms_norm": (rms_norm, lambda dy, s: 1 / 0)}
number, empty, pair, array = 1, {}, {"mla": 1}, {"array": 1}
unknown = {"rmsnorm": (1, 2)}
"""


def test_a_table_of_somebodys_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--implementation package.module:table: their functions in the place of ours."""
    (tmp_path / "their_table.py").write_text(TABLE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = tmp_path / "r.json"

    def verify(place: str, *more: str) -> Done:
        where = ("--implementation", f"their_table:{place}", "--examples", "1")
        return refimpl_here("verify", *more, *where, cwd=tmp_path)

    done = verify("ops", "--json", str(found))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("errors in units (4 allowed): every tensor holds")
    report = json.loads(found.read_text())
    assert report["ok"] is True
    assert {t["op"] for t in report["tensors"]} == {"rms_norm", "swiglu"}
    assert "swiglu" not in verify("ops", "rms_norm").stdout
    done = verify("wrong")
    assert done.returncode == 1
    assert "first wrong: rms_norm/grad/w" in done.stdout
    done = verify("raising")
    assert done.returncode == 1
    line = TABLE.splitlines().index(next(x for x in TABLE.splitlines() if "1 / 0" in x)) + 1
    assert f"their_table.py:{line}: ZeroDivisionError: division by zero" in done.stdout
    for place, more, message in (
        ("ops", ["mla"], "the table lacks mla"),
        ("ops", ["nothing"], "unknown op nothing; there are linear"),
        ("ops", ["--digits", "30"], "--digits cannot be combined with your own functions"),
        ("ops", ["--backend", "cupy"], "--backend cannot be combined with your own functions"),
        ("none", [], "their_table has no none"),
        ("", [], "--implementation must be package.module:table, got their_table:"),
        ("number", [], "must be a mapping from op to (forward, backward), got int"),
        ("empty", [], "their_table:empty: no op in it"),
        ("unknown", [], "their_table:unknown: unknown op rmsnorm; there are linear"),
        ("pair", [], "their_table:pair: mla must be (forward, backward), got 1"),
        ("array", [], "their_table:array: array must be a function, got int"),
    ):
        done = verify(place, *more)
        assert (done.returncode, done.stdout) == (2, ""), done.stdout
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    done = refimpl_here("verify", "--implementation", "no_such_module:x", cwd=tmp_path)
    assert done.returncode == 2
    assert "no_such_module can't be imported: ModuleNotFoundError" in done.stderr


def test_grade_a_pair(tmp_path: Path) -> None:
    """A file with its own forward is compared with ours; it may name the way into its library."""
    mine = tmp_path / "mine.py"
    source = TABLE.partition("ops = ")[0].replace("def rms_norm(", "def rms_norm_forward(")
    mine.write_text(source)
    done = refimpl_here("grade", "rms_norm", str(mine), "--examples", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every tensor holds" in done.stdout
    mine.write_text(source.replace("dn - n * (dn * n).mean(-1, keepdims=True)", "dn"))
    done = refimpl_here("grade", "rms_norm", str(mine), "--examples", "1")
    assert done.returncode == 1
    assert "your numbers are those of the planted bug 'no mean term' of rms_norm" in done.stdout
    assert done.stdout.endswith("\ndx: see (rms_norm.4) in derivations/rms_norm.md\n")
    mine.write_text(RIGHT + "\ndef array(x):\n    return x\n")
    done = refimpl_here("grade", "rms_norm", str(mine))
    assert done.returncode == 2
    assert "mine.py must also define rms_norm_forward" in done.stderr
