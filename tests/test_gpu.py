"""What `make gpu` would run, what it says where there is no GPU, and how it ends what hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_plan
import pytest
from gpu_plan import Counts, Machine, Stage, stages, toolkit

from refimpl.bench.rows import ROWS
from refimpl.kernels import SOURCE
from refimpl.verify import CASES

import gpu
from gpu import Outcome, execute, main
from support import FULL, ROOT

DEVICE = Machine("python", "compute-sanitizer", 8)
TESTS = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def run_for(tmp_path: Path, code: str, seconds: float, shows: str = "tests", **added: str) -> Any:
    """(what came out, what the log has after its first line) of a stage that runs ``code``."""
    with (tmp_path / "log").open("w") as log:
        done = execute(Stage("some", shows, python(code), added, 60), log, seconds)
    return done, (tmp_path / "log").read_text().partition("\n")[2]


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


def test_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of value; what compiles slowly is set everywhere, torch is left out of the first
    list, no sanitizer watches pytest."""
    monkeypatch.setattr(gpu_plan, "toolkit", lambda environment: "/toolkit")
    plan = stages(DEVICE, Path("/out"), "abc")
    pytest_ = "python -m pytest -v --tb=short -p no:benchmark -W default"
    bench = "python -m refimpl bench --gpu --results /out"
    verify = "python -m refimpl verify --backend cupy"
    columns = {name: f" --implementation {name}" for name in ("cuda", "numba_cuda")} | {"cupy": ""}
    ops = {f"{n}-ops": f"{verify}{options} {' '.join(CASES)}" for n, options in columns.items()}
    watched = {
        tool: f"compute-sanitizer --tool {tool} --error-exitcode 9 python tests/gpu_kernels.py"
        for tool in gpu_plan.TOOLS
    }
    assert {stage.name: " ".join(stage.command) for stage in plan.first} == {
        "probe": "python tests/gpu_probe.py /out/probe.json",
        "shapes": f"{pytest_} tests/bench -k v3_shapes",
        "bench": f"{bench}/bench --no-torch --commit abc",
        "tests": f"{pytest_} -n 8 tests/kernels",
        "cuda-ops": ops["cuda-ops"],
        "bfloat16": f"{verify} --implementation cuda --dtype bfloat16",
    }
    names = ["probe", "shapes", "bench", "tests", "cuda-ops", "bfloat16"]
    assert [stage.name for stage in plan.first] == names
    model = {f"{n}-models": f"{verify}{options} model" for n, options in columns.items()}
    rest = {stage.name: " ".join(stage.command) for stage in (*plan.more, *plan.named)}
    assert rest | {"cuda-ops": ops["cuda-ops"]} == (
        {"torch": f"{bench}/torch --commit abc"} | ops | model | watched
    )
    assert [stage.name for stage in plan.more] == [
        *("torch", "memcheck", "racecheck", "cuda-models")
    ]
    quick = {"CUPY_ACCELERATORS": "", "CUPY_NVRTC_USE_PCH": "1", "CUDA_HOME": "/toolkit"}
    for stage in (*plan.first, *plan.more, *plan.named):
        on_device = {"REFIMPL_GPU": "1"} if "pytest" in stage.command else {}
        assert stage.environment == quick | on_device, stage.name
    alone = stages(Machine("python"), Path("/out"))
    assert not {stage.name for stage in (*alone.more, *alone.named)} & set(gpu_plan.TOOLS)
    assert "-n" not in alone.first[3].command


def test_the_plan_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Each list takes less than its nine minutes, by the estimate that is printed, and each stage
    less than its limit."""
    plan = stages(DEVICE, Path("/out"))
    assert sum(stage.estimate() for stage in plan.first) <= 0.7 * 60 * gpu.MINUTES
    assert sum(stage.estimate() for stage in plan.more) <= 60 * gpu.MINUTES
    for stage in (*plan.first, *plan.more, *plan.named):
        assert 1.2 * stage.estimate() <= stage.limit, stage.name
    assert main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(")")[1].split(":")[0].strip() for line in lines[1:-1]] == [
        stage.name for stage in plan.first
    ]
    assert re.fullmatch(r" *\d+ in all, [5-8]\.\d minutes", lines[-1])
    some = Stage("x", "", (), {}, 1, Counts(1, 2, 3, 4, 1000, 5, 6), workers=2)
    cost = gpu_plan.Costs()
    by_hand = cost.processes + 2 * cost.cuda + 3 * cost.numba_cuda + 4 * cost.cupy
    assert some.estimate() == pytest.approx(by_hand + (1000 * cost.calls + 6) / 2 + 5)


def test_toolkit(tmp_path: Path) -> None:
    """The first folder that has nvvm; none if the environment says where, or if there is none."""
    without = tmp_path / "without"
    without.mkdir()
    with_nvvm = tmp_path / "cuda-13.0"
    (with_nvvm / "nvvm" / "lib64").mkdir(parents=True)
    (with_nvvm / "nvvm" / "lib64" / "libnvvm.so.4").touch()
    assert toolkit({}, [without, with_nvvm]) == str(with_nvvm)
    assert toolkit({}, [without]) is None
    for name in ("CUDA_HOME", "CUDA_PATH"):
        assert toolkit({name: "/elsewhere"}, [with_nvvm]) is None
    nvcc = with_nvvm / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    assert toolkit({"PATH": str(nvcc.parent)}) == str(with_nvvm)


def test_readme_has_the_stages() -> None:
    page = (ROOT / "kernels" / "README.md").read_text()
    plan = stages(DEVICE, Path("out"))
    for stage in (*plan.first, *plan.more, *plan.named):
        assert f"`{stage.name}`" in page
    assert "--tool memcheck --error-exitcode 9 python tests/gpu_kernels.py" in page


def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = (
        "import os, sys; print('Device not supported'); print(os.environ['X']); "
        "sys.exit(int(os.environ['X']))"
    )
    for shows, code, verdict in (
        ("tests", "0", "holds"),
        ("tests", "1", "DOES NOT HOLD"),
        ("compute-sanitizer memcheck", "1", "could not run: Device not supported"),
    ):
        done, log = run_for(tmp_path, says, 60, shows, X=code)
        assert done == Outcome(verdict)
        assert capsys.readouterr().out.endswith(f"Device not supported\n{code}\n")
        assert log == f"Device not supported\n{code}\n"
    lost = "print('E   device_errors.DeviceLost: why'); print('DeviceLost: why'); exit(1)"
    assert run_for(tmp_path, lost, 60)[0].notes == ("the device was lost: why",)


def test_a_stage_is_stopped(tmp_path: Path) -> None:
    """With all that it started, though all of it ignores being asked, and one has left the group
    and keeps the pipe open; what was printed before is kept."""
    sleeps = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        f"import subprocess, sys; sleeps = (sys.executable, '-c', {sleeps!r}); "
        "child = subprocess.Popen(sleeps); "
        "subprocess.Popen(['sleep', '7'], start_new_session=True); "
        f"print(child.pid, flush=True); {sleeps}"
    )
    start = time.monotonic()
    done, log = run_for(tmp_path, code, 1.6)
    assert done == Outcome("STOPPED")
    assert 1.5 <= time.monotonic() - start < 5.5
    with pytest.raises(ProcessLookupError):
        wait_for_the_end_of(int(log))


def wait_for_the_end_of(number: int) -> None:
    """Signals a process until there is none: who is killed may need a moment to be reaped."""
    for _ in range(100):
        os.kill(number, 0)
        if Path(f"/proc/{number}/stat").read_text().split()[2] == "Z":
            raise ProcessLookupError
        time.sleep(0.02)


def test_a_stage_is_asked_first(tmp_path: Path) -> None:
    """So that pytest says what failed before the limit."""
    code = "import signal; signal.signal(2, lambda *_: print('so far')); signal.pause()"
    assert run_for(tmp_path, code, 2) == (Outcome("STOPPED"), "so far\n")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpus", lambda: ["GPU 0: Some card (UUID: GPU-1)"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_a_failure_is_exit_1_and_stops_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_a_gpu: None,
) -> None:
    out = tmp_path / "new"
    arguments = ["--out", str(out), "--results", str(tmp_path / "results"), "--commit", "abc"]
    for verdict, code in (
        ("holds", 0),
        ("DOES NOT HOLD", 1),
        ("STOPPED", 1),
        ("could not run: Device not supported", 0),
    ):
        given = Outcome(verdict, ("a note",))
        monkeypatch.setattr(gpu, "execute", lambda stage, log, seconds, given=given: given)
        assert main(arguments) == code
        shown, summary = capsys.readouterr().out, (out / "summary").read_text()
        assert (
            f"{verdict}: cuda-ops, every gradient of the ops by cuda (0 s)\n    a note" in summary
        )
        assert summary in shown
        assert main([*arguments, "bench"]) == code
        assert (out / "summary").read_text().count("\n") == 2
        found = json.loads((out / "run.json").read_text())
        assert found["commit"] == "abc"
        assert found["gpus"] == ["GPU 0: Some card"]
        assert [stage["verdict"] for stage in found["stages"]] == [verdict]
    assert main([*arguments, "--minutes", "0"]) == 1
    assert "NOT RUN: tests, " in (out / "summary").read_text()
    assert main([*arguments, "--more", "--minutes", "0"]) == 1
    assert "NOT RUN: torch, " in (out / "summary").read_text()
    with pytest.raises(SystemExit):
        main([*arguments, "nothing"])


def test_a_stage_gets_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_a_gpu: None
) -> None:
    """Nine minutes in all: the limits, and then what earlier stages left."""
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    asked = list[float]()

    def slow(stage: Stage, log: Any, seconds: float) -> Outcome:
        asked.append(seconds)
        clock[0] += seconds
        return Outcome("holds")

    monkeypatch.setattr(gpu, "execute", slow)
    main(["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")])
    limits = [stage.limit for stage in stages(DEVICE, Path("out")).first]
    assert asked[:3] == limits[:3]
    assert sum(asked) == 540
    assert sum(limits) > 540


def test_what_was_done_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_a_gpu: None
) -> None:
    """Summary and run.json say while a stage runs what came before, with the benchmark's rows; they
    are kept with the results, and fewer rows never take the place of more."""
    out, results = tmp_path / "out", tmp_path / "results"

    def writes(stage: Stage, log: Any, seconds: float) -> Outcome:
        if stage.name == "tests":
            raise KeyboardInterrupt
        found = json.loads((out / "run.json").read_text())
        assert found["stages"][-1]["verdict"] == "RUNNING"
        if stage.name in ("bench", "torch"):
            rows = [1, 2] if stage.name == "bench" else [1]
            file = out / "parts" / stage.name / "card.json"
            file.parent.mkdir()
            file.write_text(json.dumps({"rows": rows}))
        return Outcome("holds")

    monkeypatch.setattr(gpu, "execute", writes)
    arguments = ["--out", str(out), "--results", str(results)]
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    found = json.loads((out / "run.json").read_text())
    assert [stage["verdict"] for stage in found["stages"]] == [*["holds"] * 3, "RUNNING"]
    assert found["bench"] == {"rows": [1, 2]}
    assert (out / "summary").read_text().count("holds: ") == 3
    for stage in ("bench", "torch"):
        assert main([*arguments, stage]) == 0
        assert json.loads((results / "card.json").read_text()) == {"rows": [1, 2]}
    (kept,) = (results / "runs").glob("*.json")
    assert re.fullmatch(r"some-card-\d{4}-\d\d-\d\d-gpu\.json", kept.name)


def test_an_ended_run_ends_its_stage(tmp_path: Path) -> None:
    """A signal to tests/gpu.py: the stage's group is ended too, and what was done is written."""
    code = (
        "import sys, gpu, gpu_plan; s = gpu_plan.Stage('one', 'it', "
        "(sys.executable, '-c', "
        "'import os, time; print(os.getpid(), flush=True); time.sleep(60)'), "
        "{}, 60); gpu.gpus = lambda: ['GPU 0: Card']; "
        "gpu_plan.stages = lambda *_: gpu_plan.Plan([s], [], []); "
        f"sys.exit(gpu.main(['--out', {str(tmp_path)!r}, '--commit', 'abc']))"
    )
    with subprocess.Popen(
        python(code),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": TESTS},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        number = int(next(line for line in process.stdout if line.strip().isdigit()))
        process.terminate()
        assert process.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        wait_for_the_end_of(number)
    assert json.loads((tmp_path / "run.json").read_text())["stages"][0]["verdict"] == "RUNNING"


def test_suite_on_a_pretended_device() -> None:
    """What only runs on a device runs: strided arrays, moves there and back, errors, products; some
    in one type, in test-full in all. Tests that only compile are not there."""
    types = "" if FULL else " and bfloat16"
    chosen = (
        f"not numba and (strided and (swiglu or embedding){types} or finite and rms_norm or "
        f"products_on_the_device or misread or nothing_to_do or extremes{types} or "
        "permute or test_adamw or adds_as)"
    )
    command = (
        *(sys.executable, *gpu_plan.PYTEST, "-p", "pretended_device"),
        *("tests/kernels", "-k", f"{chosen} or budget or stands_for_all"),
    )
    environment = os.environ | {"REFIMPL_GPU": "1", "PYTHONPATH": TESTS}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") > 20
    assert "test_compile" not in done.stdout
    assert "test_numba_cuda" not in done.stdout


def counted(tmp_path: Path, *program: str) -> tuple[str, dict[str, Any]]:
    """What a program says on the pretended device, and what it did there."""
    environment = os.environ | {"PYTHONPATH": TESTS}
    environment["REFIMPL_PRETEND_COUNTS"] = str(tmp_path / "counts")
    done = subprocess.run(
        (sys.executable, "-m", "pretended_device", *program),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads((tmp_path / "counts").read_text())


@pytest.mark.skipif(not FULL, reason="test-full")
def test_probe(tmp_path: Path) -> None:
    """One launch of each kind; a kind that fails is said, and is exit 1."""
    said, counts = counted(tmp_path, "tests/gpu_probe.py", str(tmp_path / "probe.json"))
    assert "one launch of each kind holds" in said
    assert [*counts["launches"]] == [
        "cuda swiglu_forward float32",
        "numba_cuda swiglu_forward float32",
    ]
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["versions"].keys() >= {"device", "driver", "cupy", "NVRTC", "nvvm", "numba-cuda"}
    assert found["versions"]["nvvm"].endswith("libnvvm.so.4")
    assert len(found["launches"]) == 7
    assert all(answer.startswith("error ") for answer in found["launches"].values())


def test_answers_that_fail(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_probe import answers

    found, failed = answers({"one": lambda: "1", "two": lambda: str(1 // 0)}, "FAILS")
    assert found == {
        "one": "1",
        "two": "FAILS: ZeroDivisionError: integer division or modulo by zero",
    }
    assert failed == ["two"]
    assert capsys.readouterr().out.startswith("one: 1 (0.0 s)\ntwo: FAILS: ")


@pytest.mark.skipif(not FULL, reason="all kernels, under the interpreter")
def test_every_kernel_once(tmp_path: Path) -> None:
    """compute-sanitizer's script launches each kernel of either language, in each of its types."""
    _, counts = counted(tmp_path, "tests/gpu_kernels.py")
    for column, files in (("cuda", "*.cu"), ("numba_cuda", "*_numba_cuda.py")):
        text = "".join(path.read_text() for path in SOURCE.glob(files))
        wanted = set(re.findall(r"__global__ void\s+(?:__launch\w+\([^)]*\)\s*)?(\w+)", text))
        found = {key.split()[1] for key in counts["launches"] if key.startswith(f"{column} ")}
        types = {key.split()[2] for key in counts["launches"] if key.startswith(f"{column} ")}
        if column == "cuda":
            assert found == wanted
            all_in_cuda = found
        else:
            assert set() < found < all_in_cuda
        assert types == set(("float64", "float32", "bfloat16")[: 3 if column == "cuda" else 2])


@pytest.mark.skipif(not FULL, reason="minutes: every stage of both lists")
def test_pretend(tmp_path: Path) -> None:
    """Every stage, with one example, on the pretended device."""
    command = ("tests/gpu.py", "--pretend", "--minutes", "20", "--out", str(tmp_path))
    done = subprocess.run((sys.executable, *command), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (tmp_path / "summary").read_text()
    plan = stages(Machine("python", "compute-sanitizer"), Path("out"))
    found = json.loads((tmp_path / "run.json").read_text())
    assert [(stage["name"], stage["verdict"]) for stage in found["stages"]] == [
        (stage.name, "holds") for stage in (*plan.first, *plan.more, *plan.named)
    ]
    assert len(found["bench"]["rows"]) == len(found["torch"]["rows"]) == len(ROWS) == 34
    assert found["probe"]["versions"]["device"] == "Pretended GPU"
