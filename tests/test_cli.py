"""The command line as a user meets it: output, exit codes, and one clear line for what could not
run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import refimpl.ops.rms_norm
from refimpl.check.planted import PLANTED, plant
from refimpl.cli.app import ORDER, app
from refimpl.errors import CouldNotRun
from refimpl.ops import Op
from refimpl.text import load_text

SAMPLE = (
    "It was a bright cold day in November, and all the gradients were striking thirteen digits. "
    * 3
)


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``refimpl ARGUMENTS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "refimpl", *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_verify_some_ops() -> None:
    done = run("verify", "rope", "rms_norm", "--examples", "2")
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
    done = run(
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


def test_narrow_terminal_cuts_no_number() -> None:
    """On 80 columns the table's lines wrap; no cell ends in an ellipsis."""
    import os
    import pty

    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "refimpl", "verify", "rope", "model_grpo"],
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
    assert "…".encode() not in shown


def test_float32() -> None:
    done = run("verify", "swiglu", "--dtype", "float32", "--examples", "1")
    assert done.returncode == 0
    assert re.search(r"gate +\S+ +– ", done.stdout)


def test_the_same_seed_gives_the_same_table() -> None:
    first, second = (
        run("verify", "router", "--examples", "1").stdout.splitlines()[:-1] for _ in range(2)
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
            "--implementation must be one of reference, flash, absorbed, cuda, numba_cuda, "
            "got magic",
        ),
        (
            ["verify", "--convention", "mine"],
            "--convention must be one of official, paper, hf, got mine",
        ),
        (
            ["verify", "--dtype", "bfloat16"],
            "--dtype must be one of float64, float32, got bfloat16",
        ),
        (["verify", "--examples", "0"], "--examples must be at least 1, got 0"),
        (["verify", "--model-examples", "0"], "--model-examples must be at least 1, got 0"),
        (
            ["verify", "--implementation", "cuda"],
            "--backend must be cupy for the implementation cuda, got numpy",
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
        (["grade", "rms_norm", "number.py"], "number.py must define rms_norm_backward(dy, saved)"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_could_not_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    """One line on standard error, exit code 2, and no traceback."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "dull.txt").write_bytes(b"\x00" * 100)
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "number.py").write_text("rms_norm_backward = 1\n")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("refimpl: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bogus"], "no such option: --bogus; see refimpl --help"),
        (["nothing"], "no such command 'nothing'; see refimpl --help"),
        (["count", "--lenght", "3"], "no such option: --lenght .*; see refimpl count --help"),
        (["count", "--length", "x"], "invalid value for '--length': .*; see refimpl count --help"),
        (["count", "v3", "v2"], "got unexpected extra argument.*v2.*; see refimpl count --help"),
        (["grads", "--out", "o"], "missing option '--checkpoint'; see refimpl grads --help"),
        (["grade"], "missing argument 'op'; see refimpl grade --help"),
        (["verify", "--dtype", "int8"], "--dtype must be one of float64, float32, got int8"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_usage_errors(arguments: list[str], line: str) -> None:
    """One line, in lower case as all others, that says where to read on."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"refimpl: {line}\n", done.stderr, re.IGNORECASE), done.stderr


def test_usage_errors_of_the_script() -> None:
    """The installed command says what ``python -m refimpl`` says."""
    script = Path(sys.executable).with_name("refimpl")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    for arguments in (["--bogus"], ["--version"], ["count", "--length", "0"]):
        done = subprocess.run([script, *arguments], capture_output=True, text=True)
        other = run(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (
            other.returncode,
            other.stdout,
            other.stderr,
        )


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "refimpl 0.1.0\n", "")


def test_help() -> None:
    """Without a command: the help, in reading order; no command's summary is cut off."""
    done = run()
    assert done.returncode == 2
    assert done.stdout == run("--help").stdout
    summaries = done.stdout.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in summaries] == ORDER
    assert not [line for line in summaries if line.endswith("...")]


def _options() -> set[str]:
    from typer.main import get_command

    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    return {x for command in commands for p in command.params for x in p.opts + p.secondary_opts}


def test_options_are_named_in_cli_alone() -> None:
    """The package raises with arguments' names; refimpl/cli alone makes options of them. No string
    outside names one, docstrings apart."""
    options = {x for x in _options() if x.startswith("--")}
    assert {"--digits", "--balance-alpha", "--json", "--no-logits", "--bytes"} <= options
    named = re.compile(rf"(?<![\w-])(?:{'|'.join(sorted(options))})(?![\w-])")
    package = Path(refimpl.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if package / "cli" in path.parents:
            continue
        tree = ast.parse(path.read_text())
        documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            f"{path.relative_to(package)}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if node not in documentation and named.search(node.value)
        ]
    assert found == []


def test_arguments_become_options() -> None:
    """At the beginning and at the end of a message, and nowhere else; names of no option stay."""
    error = CouldNotRun("digits: start anew with", argument="digits", remedy="force")
    assert str(error) == "digits digits: start anew with force"
    assert error.spelled({"digits": "--digits"}) == "--digits digits: start anew with force"
    assert error.spelled({"force": "--force"}) == "digits digits: start anew with --force"


def test_no_gpu() -> None:
    """Without CuPy or a device, asking for it is one clear line; with both, this is the place to
    see it hold."""
    done = run("verify", "linear", "--backend", "cupy", "--examples", "1")
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
    assert run("grade", "rms_norm", str(mine)).returncode == 0
    mine.write_text(RIGHT.replace("dn - n * (dn * n).mean(axis=-1, keepdims=True)", "dn"))
    done = run("grade", "rms_norm", str(mine))
    assert done.returncode == 1
    assert "FAIL rms_norm x: finite-difference error" in done.stdout
    assert "FAIL rms_norm w" not in done.stdout
    mine.write_text("def rms_norm_backward(dy, saved):\n    return dy\n")
    done = run("grade", "rms_norm", str(mine))
    assert done.returncode == 1
    assert "backward must return 2 gradients" in done.stdout
    mine.write_text("def rms_norm_backward(dy, saved):\n    return dy[99], dy\n")
    done = run("grade", "rms_norm", str(mine))
    assert done.returncode == 1
    assert "IndexError" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_broken_op_fails_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if somebody had edited the file: exit code 1, and the tensor in words."""
    from typer.testing import CliRunner

    broken = plant(next(bug for bug in PLANTED if bug.name == "no mean term"))
    assert isinstance(broken, Op)
    monkeypatch.setitem(refimpl.ops.IMPLEMENTATIONS["reference"], "rms_norm", broken)
    result = CliRunner().invoke(app, ["verify", "rms_norm", "--examples", "1"])
    assert result.exit_code == 1
    assert "FAIL rms_norm x" in result.stdout


def test_default_text_is_large() -> None:
    text = load_text()
    assert len(text.data) > 300_000
    assert b"The Python" in text.data


def test_short_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(63))
    with pytest.raises(CouldNotRun, match="at least 64 bytes, got 63"):
        load_text(path)


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    """A result that is there already is replaced in one step, never truncated first."""
    out = tmp_path / "r.json"
    out.write_text("old")
    assert run("verify", "linear", "--examples", "1", "--json", str(out)).returncode == 0
    assert json.loads(out.read_text())["ok"] is True


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "refimpl", "conventions", "1"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "refimpl: the output can't be written: No space left on device\n"


def test_terminal_without_greek() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "refimpl", "conventions", "18"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ln(?_ref/?)" in done.stdout or "KL(?_ref??)" in done.stdout
