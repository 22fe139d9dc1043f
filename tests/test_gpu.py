"""What `make gpu` would run, and what it says where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refimpl.verify import CASES, MODELS

import gpu
from gpu import Stage, execute, main, stages
from support import FULL

ROOT = Path(__file__).parents[1]


def test_no_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0 and one line, whether nvidia-smi is missing or lists nothing; a failing command is no
    GPU either."""
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


def test_stages() -> None:
    """Tests, benchmark, verify with and without kernels, and each tool of the sanitizer if there is
    one."""
    out = Path("/somewhere")
    bare = stages("python", None, out)
    checked = stages("python", "compute-sanitizer", out, "abc", xdist=True)
    pytest_ = "python -m pytest -v --tb=short -p no:benchmark -W default"
    assert [" ".join(stage.command) for stage in bare] == [
        f"{pytest_} tests/kernels",
        f"{pytest_} tests/bench",
        "python -m refimpl bench --gpu --results /somewhere",
        *(
            f"python -m refimpl verify --backend cupy{column} {' '.join(names)}"
            for names in (CASES, MODELS)
            for column in ("", " --implementation cuda", " --implementation numba_cuda")
        ),
    ]
    verified = [
        f"{column}-{what}"
        for what in ("ops", "models")
        for column in ("cupy", "cuda", "numba_cuda")
    ]
    assert [stage.name for stage in checked] == ["tests", "shapes", "bench", *verified, *gpu.TOOLS]
    assert checked[0].command[-3:] == ("-n", "8", "tests/kernels")
    assert checked[2].command[-2:] == ("--commit", "abc")
    for stage in checked[9:]:
        assert stage.command[:3] == ("compute-sanitizer", "--tool", stage.name)
        assert stage.command[7] == "python"
        assert stage.environment == {
            "CUPY_ACCELERATORS": "",
            "REFIMPL_GPU": "1",
            "REFIMPL_SANITIZER": "1",
        }
    for name in ("kernels", "bench"):
        assert (ROOT / "tests" / name).exists()
    for stage in checked[:3]:  # so that a log comes every ten minutes
        assert stage.limit < 600


def test_readme_has_the_commands() -> None:
    """Those of kernels/README.md that run by hand what a stage runs are the stage's."""
    page = (ROOT / "kernels" / "README.md").read_text()
    for stage in stages("python", "compute-sanitizer", Path("out")):
        assert f"`{stage.name}`" in page
        if stage.name == "memcheck":
            assert " ".join(f'"{word}"' if " " in word else word for word in gpu.SANITIZED) in page


def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = (
        "import os, sys; print('Device not supported'); print(os.environ['X']); "
        "sys.exit(int(os.environ['X']))"
    )
    for what, code, verdict in (
        ("tests", "0", "holds"),
        ("tests", "1", "DOES NOT HOLD"),
        ("compute-sanitizer memcheck", "1", "could not run: Device not supported"),
    ):
        stage = Stage("some", what, (sys.executable, "-c", says), {"X": code}, 60)
        assert execute(stage, tmp_path / "log", 60) == verdict
        assert capsys.readouterr().out.endswith(f"Device not supported\n{code}\n")
        assert (tmp_path / "log").read_text() == f"Device not supported\n{code}\n"


def test_a_stage_is_stopped(tmp_path: Path) -> None:
    """With all that it started, and what it printed before is kept."""
    says = (
        "import subprocess, sys, time; print('begun', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    start = time.monotonic()
    assert (
        execute(Stage("some", "tests", (sys.executable, "-c", says), {}, 1), tmp_path / "log", 1.5)
        == "STOPPED"
    )
    assert time.monotonic() - start < 30
    assert (tmp_path / "log").read_text() == "begun\n"


def test_a_failure_is_exit_1_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "gpus", lambda: ["GPU 0"])
    arguments = ["--out", str(tmp_path / "new")]
    for verdict, code in (
        ("holds", 0),
        ("DOES NOT HOLD", 1),
        ("STOPPED", 1),
        ("could not run: Device not supported", 0),
    ):
        monkeypatch.setattr(gpu, "execute", lambda stage, log, seconds, verdict=verdict: verdict)
        assert main(arguments) == code
        shown, summary = capsys.readouterr().out, (tmp_path / "new" / "summary").read_text()
        assert f"{verdict}: cuda-models, every gradient of the models by cuda" in summary
        assert summary in shown
        assert main([*arguments, "bench"]) == code
        assert (tmp_path / "new" / "summary").read_text().count("\n") == 1
    assert main([*arguments, "--minutes", "0"]) == 1
    assert "NOT RUN: tests, " in (tmp_path / "new" / "summary").read_text()
    with pytest.raises(SystemExit):
        main([*arguments, "nothing"])


def test_suite_on_a_pretended_device() -> None:
    """What only runs on a device runs: strided arrays, moves there and back, errors, products; some
    in one type, in test-full in all."""
    types = "" if FULL else " and bfloat16"
    chosen = (
        f"not numba and (strided and (swiglu or embedding){types} or finite and rms_norm or "
        f"products_on_the_device or misread or nothing_to_do or extremes{types} or "
        "permute or test_adamw or adds_as)"
    )
    command = (sys.executable, *gpu.PYTEST, "-p", "pretended_device", "tests/kernels", "-k", chosen)
    environment = os.environ | {
        "REFIMPL_GPU": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") > 20


def test_selection_of_the_sanitizer() -> None:
    """It picks at least one test of every op."""
    names = "tests/kernels", "-q", "--collect-only", *gpu.SANITIZED[-2:]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *names], capture_output=True, text=True, cwd=ROOT
    )
    for op in (
        "rms_norm",
        "swiglu",
        "rope",
        "cross_entropy",
        "log_prob",
        "embedding",
        "router",
        "moe",
        "grpo",
    ):
        assert f"test_same_bits[cuda-{op}-" in done.stdout
    assert "test_adamw" in done.stdout
