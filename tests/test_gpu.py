"""What `make gpu` would run, and what it says where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gpu
from gpu import commands, execute, main

ROOT = Path(__file__).parents[1]


def test_no_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0 and one line, whether nvidia-smi is missing or lists nothing; a failing command is no GPU either."""
    monkeypatch.setenv("PATH", "")
    assert gpu.gpus() == []
    assert main([]) == 0
    assert capsys.readouterr().out == "no GPU: nvidia-smi lists none; nothing was run\n"
    assert main(["--only-look"]) == 3


def test_gpus_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "nvidia-smi"
    for code, wanted in ((0, ["GPU 0: Some card"]), (9, [])):
        listed.write_text(f"#!/bin/sh\necho 'GPU 0: Some card'\necho 'more'\nexit {code}\n")
        listed.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert gpu.gpus() == wanted
    assert main(["--only-look"]) == 3


def test_commands() -> None:
    """Tests, verify with and without kernels, and each tool of the sanitizer if there is one."""
    bare, checked = commands("python", None, ["cuda"]), commands("python", "compute-sanitizer", ["cuda"])
    assert [" ".join(arguments) for _, arguments, _ in bare] == [
        "python -m pytest -q -p no:benchmark tests/test_kernels.py tests/test_bench.py",
        "python -m refimpl verify --backend cupy",
        "python -m refimpl verify --backend cupy --implementation cuda",
    ]
    assert checked[:3] == bare
    assert len(checked) == 3 + len(gpu.TOOLS)
    for what, arguments, environment in checked[3:]:
        assert arguments[0] == what.split()[0]
        assert arguments[7] == "python"
        assert environment == {"REFIMPL_GPU": "1", "REFIMPL_SANITIZER": "1"}
    for name in gpu.SUITE[5:]:
        assert (ROOT / name).is_file()


def test_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    says = "import os, sys; print('Device not supported'); print(os.environ['X']); sys.exit(int(os.environ['X']))"
    for what, code, verdict in (
        ("tests", "0", "holds"), ("tests", "1", "DOES NOT HOLD"),
        ("compute-sanitizer memcheck", "1", "could not run: Device not supported"),
    ):  # fmt: skip
        assert execute((what, (sys.executable, "-c", says), {"X": code})) == verdict
        assert capsys.readouterr().out.endswith(f"Device not supported\n{code}\n")


def test_a_failure_is_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "gpus", lambda: ["GPU 0"])
    for verdict, code in (("holds", 0), ("DOES NOT HOLD", 1), ("could not run: Device not supported", 0)):
        monkeypatch.setattr(gpu, "execute", lambda command, verdict=verdict: verdict)
        assert main([]) == code
        assert f"{verdict}: every gradient, ops and model, by cuda" in capsys.readouterr().out


def test_selection_of_the_sanitizer() -> None:
    """It picks at least one test of every op."""
    names = "tests/test_kernels.py", "-q", "--collect-only", *gpu.SANITIZED[-2:]
    done = subprocess.run([sys.executable, "-m", "pytest", *names], capture_output=True, text=True, cwd=ROOT)
    for op in ("rms_norm", "swiglu", "rope", "cross_entropy", "log_prob", "embedding", "router", "moe", "grpo"):
        assert f"test_same_bits[cuda-{op}-" in done.stdout
    assert "test_adamw" in done.stdout
