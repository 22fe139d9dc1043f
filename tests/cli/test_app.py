"""What all commands share: files never half written, output that can't be written, terminals."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import refimpl
from refimpl.cli.app import GROUPS, ORDER, app
from refimpl.errors import CouldNotRun
from refimpl.kernels.columns import table_of
from refimpl.kernels.cpu.compile import numba

from golden.checkpoint_values import TRAINED
from support import refimpl_here, refimpl_process

SHELL = ["bash", "-c"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    """A result that is there already is replaced in one step, never truncated first."""
    out = tmp_path / "r.json"
    out.write_text("old")
    assert refimpl_here("verify", "linear", "--examples", "1", "--json", str(out)).returncode == 0
    assert json.loads(out.read_text())["ok"] is True


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = refimpl_process("conventions", "1", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "refimpl: the output can't be written: No space left on device\n"


def test_output_that_is_closed() -> None:
    command = f"{sys.executable} -m refimpl count v3"
    done = subprocess.run([*SHELL, f"{command} >&-"], capture_output=True, text=True)
    wanted = "refimpl: the output can't be written: standard output is closed\n"
    assert (done.returncode, done.stderr) == (2, wanted)
    done = subprocess.run([*SHELL, f"{command} --length 0 2>&-"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("arguments", ["verify linear --examples 1", "bench --table"])
def test_who_reads_may_stop(arguments: str) -> None:
    """As `head` does: nothing is said, and the exit code is that of SIGPIPE."""
    command = f"{sys.executable} -m refimpl {arguments} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run([*SHELL, command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def commands() -> dict[str, Any]:
    """The commands of the application, by name."""
    found: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return found


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyError("a\n\x1b[31m"), 70, r"KeyError at test_app.py:\d+: 'a\\n\\x1b\[31m' "),
        (ValueError("a\n\x1b[31m"), 70, r"ValueError at test_app.py:\d+: a\\n\\x1b\[31m "),
        (Panic("of Rust"), 70, r"Panic at test_app.py:\d+: of Rust "),
        (RecursionError(), 70, r"RecursionError at test_app.py:\d+:  "),
        (MemoryError(), 2, "not enough memory"),
        (OSError(36, "File name too long", "x"), 2, "x can't be used: File name too long"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
@pytest.mark.parametrize("shown", ["0", "1"])
def test_a_crash_is_no_verdict(
    error: BaseException, code: int, line: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never exits 1, which says that something does not hold; one line asks for a report."""

    def crash(model: str) -> None:
        raise error

    monkeypatch.setattr("refimpl.cli.count.load_config", crash)
    monkeypatch.setenv("REFIMPL_TRACEBACK", shown)
    done = refimpl_here("count")
    assert (done.returncode, done.stdout) == (code, "")
    said = done.stderr.splitlines()
    if code == 70:
        begin = "refimpl: a fault of refimpl itself, please report it: "
        assert re.fullmatch(f"{begin}{line}\\(REFIMPL_TRACEBACK=1 shows the traceback\\)", said[-1])
        assert ("Traceback (most recent call last):" in said) == (shown == "1")
        assert len(said) == 1 or shown == "1"
    else:
        assert said == ([f"refimpl: {line}"] if line else [])


def test_text_is_shown_as_it_is(tmp_path: Path) -> None:
    """No markup, no emoji, and nothing that a terminal would take as a command."""
    name = "[/red]:smile:\x1b[31m.txt"
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(bytes(range(32, 127)) * 20)
    done = refimpl_here("verify", "linear", "--examples", "1", "--text", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "text: [/red]:smile:\\x1b[31m.txt, 1,900 bytes" in done.stdout
    done = refimpl_here("count", "a\x1b[31m\nb\u202e")
    assert done.returncode == 2
    assert done.stderr.startswith("refimpl: a\\x1b[31m\\nb\\u202e is neither a preset")
    assert str(CouldNotRun("a\x1b\n\udcffü×")) == "a\\x1b\\n\\udcffü×"


def test_terminal_without_greek() -> None:
    done = refimpl_process("conventions", "18", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "ln(?_ref/?)" in done.stdout or "KL(?_ref??)" in done.stdout


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
        (
            ["verify", "--dtype", "int8"],
            "--dtype must be one of float32, float64, bfloat16, got int8",
        ),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_usage_errors(arguments: list[str], line: str) -> None:
    """One line, in lower case as all others, that says where to read on."""
    done = refimpl_process(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"refimpl: {line}\n", done.stderr, re.IGNORECASE), done.stderr


def test_usage_errors_of_the_script() -> None:
    """The installed command says what ``python -m refimpl`` says."""
    script = Path(sys.executable).with_name("refimpl")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    for arguments in (["--bogus"], ["--version"], ["count", "--length", "0"]):
        done = subprocess.run([script, *arguments], capture_output=True, text=True)
        other = refimpl_process(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (
            other.returncode,
            other.stdout,
            other.stderr,
        )


def test_version() -> None:
    done = refimpl_here("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "refimpl 0.1.0\n", "")


def test_first_steps() -> None:
    """Without a command: three lines, each of them a command of ours."""
    done = refimpl_here()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["refimpl", command] for command in ("verify", "grade", "--help")
    ]
    assert max(map(len, lines)) <= 100


def test_help() -> None:
    """The commands by use, each once; no command's summary is cut off or wrapped."""
    done = refimpl_here("--help")
    assert done.returncode == 0
    sections = re.findall(r"^(.+) \(refimpl (.+)\):\n((?:  .+\n)+)", done.stdout, re.M)
    assert [title for title, _, _ in sections] == list(GROUPS)
    listed = "".join(lines for _, _, lines in sections).splitlines()
    assert [line.split()[0] for line in listed] == ORDER
    assert sorted(ORDER) == sorted(commands())
    assert not [line for line in listed if line.endswith("...")]


@pytest.mark.parametrize("group", GROUPS)
def test_examples_of_the_help(group: str) -> None:
    """An example is a command of its group, whose arguments and options exist."""
    example, members = GROUPS[group]
    command, *arguments = example.split()
    assert command in members
    with commands()[command].make_context(command, arguments) as context:
        assert context.params


def test_completion_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --install-completion installs asks in this way, and gets the commands' names alone."""
    asked = {"_REFIMPL_COMPLETE": "complete_bash", "COMP_WORDS": "refimpl gra", "COMP_CWORD": "1"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    done = refimpl_here()
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["grade", "grads"], "")


def _options() -> set[str]:
    params = [p for command in commands().values() for p in command.params]
    return {x for p in params for x in p.opts + p.secondary_opts}


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
    error = CouldNotRun("digits: start again with", argument="digits", remedy="force")
    assert str(error) == "digits digits: start again with force"
    assert error.spelled({"digits": "--digits"}) == "--digits digits: start again with force"
    assert error.spelled({"force": "--force"}) == "digits digits: start again with --force"


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "linear"),
        ("grads", "--tokens", "tokens.json", "--out", "out", "--checkpoint", TRAINED),
        ("generate", "--bytes", "--prompt", "x", "--checkpoint", TRAINED),
    ],
    ids=lambda command: command[0],
)
def test_without_numba(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--implementation numba_cpu is one line that says what to install, and nothing is written."""
    monkeypatch.setitem(sys.modules, "numba", None)
    numba.cache_clear()
    table_of.cache_clear()
    (tmp_path / "tokens.json").write_text("[1, 2, 3]")
    done = refimpl_here(*command, "--implementation", "numba_cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("refimpl: numba_cpu needs Numba and threadpoolctl: pip install")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
