"""``refimpl generate`` as a user meets it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refimpl.checkpoint import Checkpoint, write_random
from refimpl.cli import main
from refimpl.cli.generate import Output, summary
from refimpl.config import preset
from refimpl.generate import Generation
from refimpl.kernels.columns import for_generation
from refimpl.memory import process_memory
from refimpl.ops import Ops
from refimpl.tokenizer import Bytes
from refimpl.train.vocabulary import tokenizer_json

from golden.checkpoint_values import TRAINED
from kernel_support import PretendedLaunch
from kernel_support.on_cupy import use_cuda
from support import byte_level, refimpl_here


def refimpl(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["refimpl", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_report_of_a_temperature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The JSON says with what was sampled, so that the same tokens can be had again."""
    prompt = "--checkpoint", TRAINED, "--bytes", "--prompt", "The value of ", "--max-tokens", 12
    found = {}
    for name, asked in {
        "greedy": (),
        "sampled": ("--temperature", 1.5, "--top-p", 0.9, "--seed", 4),
        "again": ("--temperature", 1.5, "--top-p", 0.9, "--seed", 4),
    }.items():
        report = tmp_path / f"{name}.json"
        assert not refimpl(monkeypatch, *prompt, *asked, "--json", report)
        found[name] = json.loads(report.read_text())
    settings = found["sampled"]["settings"]
    assert (settings["temperature"], settings["top_p"], settings["seed"]) == (1.5, 0.9, 4)
    assert found["greedy"]["settings"]["temperature"] == 0
    assert found["sampled"] == found["again"]
    assert found["sampled"]["results"][0]["tokens"] != found["greedy"]["results"][0]["tokens"]


def test_one_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Only the text is on standard output; speculation does not change it, and its worth is
    told."""
    shown = []
    for extra in ([], ["--speculate", 2, "--json", tmp_path / "out.json"]):
        assert not refimpl(
            monkeypatch,
            "--checkpoint",
            TRAINED,
            "--bytes",
            "--prompt",
            "The value of ",
            "--max-tokens",
            20,
            "--dtype",
            "float64",
            *extra,
        )
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out
    assert len(shown[0].out) == 21
    assert shown[0].err.startswith("1 prompt, 20 tokens, ")
    assert " drafts accepted (" in shown[1].err
    assert "tokens per forward of the main model\n" in shown[1].err
    written = json.loads((tmp_path / "out.json").read_text())
    (result,) = written["results"]
    assert result["text"] + "\n" == shown[0].out
    assert bytes(result["prompt"]) == b"The value of "
    assert summary([Generation([7], "length", 1, 1, 0)], 1.0) == (
        "1 prompt, 1 token, 1.0 s, 1.0 tokens per second; 0 of 1 draft accepted (0.0 %), 0.00 "
        "tokens per forward of the main model"
    )
    assert written["settings"]["speculate"] == 2


def test_prompts_of_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Several prompts, each shown when it is finished; --prompts gives what --prompt gives."""
    common = [
        "--checkpoint",
        TRAINED,
        "--bytes",
        "--max-tokens",
        9,
        "--temperature",
        0.8,
        "--seed",
        4,
    ]
    (tmp_path / "lines.txt").write_text("class\nreturn a\n")
    (tmp_path / "list.json").write_text('["class", "return a"]')
    outputs = []
    for way in (
        ["--prompt", "class", "--prompt", "return a"],
        ["--prompts", tmp_path / "lines.txt"],
        ["--prompts", tmp_path / "list.json"],
    ):
        assert refimpl(monkeypatch, *common, *way) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].startswith("[0] ")
    assert "\n[1] " in outputs[0]


def test_tokens_in_and_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "one.json").write_text(json.dumps(list(b"The value")))
    np.save(tmp_path / "one.npy", np.frombuffer(b"The value", np.uint8))
    np.save(tmp_path / "two.npy", np.array([[1, 2], [3, 4]]))
    outputs = []
    for name in ("one.json", "one.npy", "two.npy"):
        assert (
            refimpl(
                monkeypatch,
                "--checkpoint",
                TRAINED,
                "--tokens",
                tmp_path / name,
                "--max-tokens",
                5,
                "--stop",
                0,
            )
            == 0
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == 5
    assert outputs[2].startswith("[0] ")


def test_streams(capsys: pytest.CaptureFixture[str]) -> None:
    """One prompt's text is out as soon as it is whole."""
    output, seen = Output(Bytes(), 1), []
    for byte in "aï".encode():
        output(0, byte, "")
        seen.append(capsys.readouterr().out)
    output(0, 0xE6, "length")
    assert [*seen, capsys.readouterr().out] == ["a", "", "ï", "\N{REPLACEMENT CHARACTER}\n"]


def test_eos_of_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """generation_config.json before config.json; one id or several."""
    folder = tmp_path / "model"
    shutil.copytree(TRAINED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 32}))
    command = ["--checkpoint", folder, "--bytes", "--prompt", "The value of ", "--max-tokens", 20]
    assert refimpl(monkeypatch, *command) == 0
    assert capsys.readouterr().out.endswith(" \n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [101, 500]}))
    assert refimpl(monkeypatch, *command) == 0
    assert capsys.readouterr().out.endswith("e\n")
    assert refimpl(monkeypatch, *command, "--stop", 0) == 0
    assert len(capsys.readouterr().out) == 21
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    assert refimpl(monkeypatch, *command) == 2
    assert "eos_token_id must be a token id or a list of them, got 'end'" in capsys.readouterr().err


def test_text_of_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """tokenizer.json in, text out."""
    folder = tmp_path / "model"
    shutil.copytree(TRAINED, folder)
    names = byte_level(folder)
    assert (
        refimpl(
            monkeypatch,
            "--checkpoint",
            folder,
            "--prompt",
            "é",
            "--max-tokens",
            6,
            "--json",
            tmp_path / "o",
        )
        == 0
    )
    shown = capsys.readouterr().out
    (result,) = json.loads((tmp_path / "o").read_text())["results"]
    assert [names[token] for token in result["prompt"]] == ["Ã", "©"]
    assert shown == result["text"] + "\n"


ONE = ["--bytes", "--prompt", "x"]


def test_more_drafts_than_modules(tmp_path: Path) -> None:
    """The last module drafts on; the tokens stay."""
    options = [*ONE, "--checkpoint", TRAINED, "--max-tokens", 30]
    plain = refimpl_here("generate", *options)
    more = refimpl_here("generate", *options, "--speculate", 5, "--json", tmp_path / "out.json")
    assert (plain.returncode, more.returncode) == (0, 0), more.stderr
    assert more.stdout == plain.stdout
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["drafted"] > 2 * result["forwards"]


@pytest.mark.parametrize("at_hand", [50_000, 60_000, None])
def test_short_of_memory(at_hand: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line where the files are larger than the free memory, and the same tokens."""
    monkeypatch.setattr("refimpl.cli.generate.available_memory", lambda: at_hand)
    done = refimpl_here("generate", *ONE, "--checkpoint", TRAINED)
    assert done.returncode == 0
    line = (
        "the weights have 5.35e-05 GB, but only 5e-05 GB of memory are free: weights are read "
        "from the disk again and again\n"
    )
    assert done.stderr.startswith(line) == (at_hand == 50_000)
    assert done.stderr.count("\n") == 1 + (at_hand == 50_000)
    assert done.stdout == "tart is the sequence and the same a containeration of the seque\n"


def test_no_memory_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr("refimpl.cli.generate.generate", full)
    done = refimpl_here("generate", *ONE, "--checkpoint", TRAINED)
    assert done.returncode == 2
    assert done.stderr == (
        "refimpl: not enough memory for so many tokens (Unable to allocate 1 TiB)\n"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numba_cpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's tokens, alone, in a padded batch and with drafts; the report names it."""
    pytest.importorskip("numba")
    asked_for: list[str] = []

    def noting(implementation: str, dtype: str) -> tuple[Ops, Ops]:
        asked_for.append(implementation)
        return for_generation(implementation, dtype)

    monkeypatch.setattr("refimpl.cli.generate.for_generation", noting)
    options = ["--checkpoint", TRAINED, "--bytes", "--max-tokens", 30, "--dtype", dtype]
    one, more = ["--prompt", "The value of "], ["--prompt", "a gradient", "--prompt", "x"]
    for asked in (one, one + more, [*one, "--speculate", 2]):
        found = {}
        for implementation in ("reference", "numba_cpu"):
            report = tmp_path / f"{implementation}.json"
            how = "--implementation", implementation, "--json", report
            done = refimpl_here("generate", *options, *asked, *how)
            assert done.returncode == 0, done.stderr
            found[implementation] = json.loads(report.read_text())
            assert found[implementation]["settings"].pop("implementation") == implementation
        assert found["reference"] == found["numba_cpu"]
    assert asked_for == 3 * ["reference", "numba_cpu"]


def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the kernels, under the interpreter: the reference's tokens in float32, with a draft
    and without, and in bfloat16 those of this prompt too; all weights are on the device, and what
    decodes is the kernel of the cache."""
    use_cuda(monkeypatch)
    launches: list[PretendedLaunch] = []
    monkeypatch.setattr(
        "refimpl.kernels.columns.device_launch",
        lambda: launches.append(PretendedLaunch()) or launches[-1],  # type: ignore[func-returns-value]
    )
    options = ["--checkpoint", TRAINED, "--bytes", "--max-tokens", 3, "--prompt", "The value of "]
    on_gpu = ["--backend", "cupy", "--implementation", "cuda"]
    found = []
    for how in (["--speculate", 1], ["--speculate", 1, *on_gpu], [*on_gpu, "--dtype", "bfloat16"]):
        report = tmp_path / "report.json"
        done = refimpl_here("generate", *options, *how, "--json", report)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(report.read_text())["results"][0]["tokens"])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3
    assert len(launches) == 2
    for launch in launches:
        assert {kernel for kernel, _ in launch.reports} == {
            "mla_decode_split",
            "mla_decode_combine",
        }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("implementation", ["reference", "numba_cpu"])
def test_memory(implementation: str, tmp_path: Path) -> None:
    """The process holds no copy of the weights: beyond what it needs for a tiny model, no more than
    one matrix and one expert widened, and 5 MB."""
    if implementation == "numba_cpu":
        pytest.importorskip("numba")
    config = replace(
        preset("tiny"), width=512, vocabulary=4096, experts=32, expert_hidden=384, mtp_depth=0
    )
    write_random(config, tmp_path / "wide")
    stored = Checkpoint.open(tmp_path / "wide").bytes
    widened = 4 * config.width * (config.vocabulary + 3 * config.expert_hidden)
    assert stored > 3 * (widened + 5e6)
    peaks = []
    for folder in (TRAINED, tmp_path / "wide"):
        command = ["generate", "--checkpoint", folder, *ONE, "--max-tokens", 20]
        command += ["--implementation", implementation, "--stop", 0]
        peaks.append(process_memory([sys.executable, "-m", "refimpl", *map(str, command)]).peak)
    assert peaks[1] - peaks[0] <= widened + 5e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no tokenizer.json: give token ids with --tokens FILE, or --bytes"),
        (["--bytes"], "give at least one --prompt TEXT, --prompts FILE or --tokens FILE"),
        (["--bytes", "--prompt", "a", "--prompt", ""], "prompt 1 is empty"),
        (
            ["--bytes", "--prompt", "a\udcff"],
            "prompt 0 is not UTF-8",
        ),  # how Python hands on a broken byte
        (["--bytes", "--prompts", "gap.txt"], "prompt 1 is empty"),
        (
            ["--bytes", "--prompts", "missing.txt"],
            "--prompts missing.txt can't be read: No such file or directory",
        ),
        (["--bytes", "--prompts", "latin.txt"], "--prompts latin.txt must be UTF-8: "),
        (["--bytes", "--prompts", "broken.json"], "broken.json is not JSON: "),
        (
            ["--bytes", "--prompts", "number.json"],
            "--prompts number.json must hold a list of strings",
        ),
        (["--bytes", "--prompt", "x" * 64], "leave room for one in the context of 64, got 64"),
        (["--tokens", "high.json"], "prompt 0 must hold tokens in 0…255, got 256"),
        (
            ["--tokens", "number.json"],
            "--tokens number.json must hold one list of integers, or several",
        ),
        (
            ["--tokens", "empty.json"],
            "give at least one --prompt TEXT, --prompts FILE or --tokens FILE",
        ),
        (["--tokens", "gap.txt"], "--tokens gap.txt must be a .npy or a .json file"),
        (
            ["--tokens", "missing.npy"],
            "--tokens missing.npy can't be read: No such file or directory",
        ),
        (["--tokens", "broken.npy"], "--tokens broken.npy is not an array: "),
        (["--tokens", "zip.npy"], "--tokens zip.npy must hold one array"),
        (
            ["--tokens", "float.npy"],
            "--tokens float.npy must hold one list of integers, or several",
        ),
        (
            ["--tokens", "high.json", "--prompt", "x"],
            "--tokens cannot be combined with --prompt, --prompts or --bytes",
        ),
        (
            [*ONE, "--temperature", "-1"],
            "--temperature must be a finite number of at least 0, got -1.0",
        ),
        ([*ONE, "--top-p", "0"], "--top-p must lie in (0, 1], got 0.0"),
        ([*ONE, "--top-p", "1.1"], "--top-p must lie in (0, 1], got 1.1"),
        ([*ONE, "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        ([*ONE, "--seed", "-1"], "--seed must be at least 0, got -1"),
        ([*ONE, "--stop", "256"], "--stop must hold tokens in 0…255, got 256"),
        ([*ONE, "--speculate", "-1"], "--speculate must be at least 0, got -1"),
        (
            [*ONE, "--dtype", "bfloat16"],
            "--dtype bfloat16 needs the implementation cuda and the backend cupy, got the "
            "implementation reference",
        ),
        (
            [*ONE, "--implementation", "cuda"],
            "--backend must be cupy for the implementation cuda, got numpy",
        ),
        (
            [*ONE, "--implementation", "mine"],
            "--implementation must be one of reference, flash, absorbed, numba_cpu, cuda, "
            "numba_cuda, got mine",
        ),
        (
            [*ONE, "--convention", "mine"],
            "--convention must be one of official, paper, hf, got mine",
        ),
        ([*ONE, "--json", "no/such"], "--json no/such can't be written"),
        ([*ONE, "--checkpoint", "nowhere"], "nowhere"),
        ([*ONE, "--checkpoint", "plain", "--speculate", "1"], "speculate=1 needs an MTP module"),
    ],
    ids=lambda a: " ".join(a)[:40] if isinstance(a, list) else "",
)
def test_could_not_run(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on standard error, exit code 2, nothing on standard output."""
    monkeypatch.chdir(tmp_path)
    Path("gap.txt").write_text("a\n\nb\n")
    Path("latin.txt").write_bytes(b"\xe9t\xe9\n")
    Path("broken.json").write_text("[1,")
    Path("broken.npy").write_bytes(b"\x93NUMPY\x01")
    Path("number.json").write_text('{"a": 1}')
    Path("empty.json").write_text("[]")
    Path("high.json").write_text("[1, 256]")
    np.save("float.npy", np.ones((1, 2)))
    np.savez("zip.npz", tokens=np.ones(2, int))
    Path("zip.npz").rename("zip.npy")
    if "plain" in arguments:
        save_without_mtp(Path("plain"))
    given = [] if "--checkpoint" in arguments else ["--checkpoint", TRAINED]
    assert refimpl(monkeypatch, *given, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("refimpl: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_bytes_that_are_no_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--bytes is refused where a tokenizer.json says that the tokens are others, as BPE's are;
    that of bytes and tags is none such."""
    folder = tmp_path / "model"
    shutil.copytree(TRAINED, folder)
    given = "--checkpoint", folder, *ONE, "--max-tokens", 1
    content = tokenizer_json()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert refimpl(monkeypatch, *given) == 0
    capsys.readouterr()
    symbols = content["model"]["vocab"]
    symbols["a"], symbols["b"] = symbols["b"], symbols["a"]
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    assert refimpl(monkeypatch, *given) == 2
    line = f"refimpl: --bytes cannot be used: the tokens of {file} are not bytes\n"
    assert capsys.readouterr() == ("", line)


def save_without_mtp(folder: Path) -> None:
    from refimpl.checkpoint import save_checkpoint

    checkpoint = Checkpoint.open(TRAINED, mtp=False)
    save_checkpoint(checkpoint.load(), checkpoint.config, folder)


def test_no_package_for_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TRAINED, folder)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert refimpl(monkeypatch, "--checkpoint", folder, "--prompt", "x") == 2
    assert "text needs the package tokenizers (pip install -e '.[text]')" in capsys.readouterr().err


def test_broken_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    folder = tmp_path / "model"
    shutil.copytree(TRAINED, folder)
    (folder / "tokenizer.json").write_text("{")
    assert refimpl(monkeypatch, "--checkpoint", folder, "--prompt", "x") == 2
    error = capsys.readouterr().err
    assert f"{folder / 'tokenizer.json'} is not a tokenizer: " in error
    assert error.count("\n") == 1
