"""``refimpl grads`` as a user meets it: a checkpoint in, files of gradients out; one line for what
could not run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.checkpoint.files import content_fingerprint
from refimpl.checkpoint.names import stored_names
from refimpl.cli.grads import differing
from refimpl.cli.inputs import text_tokens
from refimpl.config import CONVENTIONS, Conventions, Yarn, preset
from refimpl.grads import GRPO, loss_and_grads
from refimpl.model import backward, forward
from refimpl.ops import GRPO_PRESETS
from refimpl.parameters import parameter_shapes

from golden.checkpoint_values import GOLDEN, LEFT, Values, assert_agree, golden_values
from random_parameters import random_parameters
from support import byte_level, refimpl_here, refimpl_process

CONFIG = preset("tiny")
TOKENS = np.random.default_rng(3).integers(0, 256, (2, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of tiny in bfloat16, and inputs beside it."""
    place = tmp_path_factory.mktemp("grads")
    params = random_parameters(CONFIG)
    save_checkpoint(params, CONFIG, place / "checkpoint", dtype="bfloat16", shard_bytes=20_000)
    plain = {
        n: p for n, p in params.items() if not n.startswith(("model.layers.3.", "model.layers.4."))
    }
    save_checkpoint(plain, replace(CONFIG, mtp_depth=0), place / "plain")
    np.save(place / "tokens.npy", TOKENS)
    (place / "tokens.json").write_text(json.dumps(TOKENS.tolist()))
    return place


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``refimpl grads`` in this process, in the folder: (exit code, standard output, standard
    error)."""
    monkeypatch.chdir(folder)

    def call(
        *arguments: Any, checkpoint: str = "checkpoint", tokens: str | None = "tokens.npy"
    ) -> tuple[int, str, str]:
        given = ["--tokens", tokens] if tokens else []
        return refimpl_here("grads", "--checkpoint", checkpoint, *arguments, *given)

    return call


def read(out: Path) -> dict[str, np.ndarray]:
    return {name: x for path in out.glob("*.safetensors") for name, x in load_file(path).items()}


def expect_equal(out: Path, gradients: dict[str, np.ndarray]) -> None:
    found, count = read(out), 0
    for name, x in gradients.items():
        parts = {name.replace(".experts.", f".experts.{e}."): p for e, p in enumerate(x)}
        for part, wanted in parts.items() if ".experts." in name else [(name, x)]:
            assert np.array_equal(found[f"grad/{part}"], wanted), part
            count += 1
    assert count == sum(name.startswith("grad/") for name in found)


def test_a_checkpoint(folder: Path, run: Any, tmp_path: Path) -> None:
    """In a process of its own: every gradient of Hugging Face's loss, what is printed, and the JSON
    file."""
    out, report = tmp_path / "new" / "out", tmp_path / "report.json"
    arguments = "--checkpoint", "checkpoint", "--tokens", "tokens.json"
    done = refimpl_process("grads", *arguments, "--out", out, "--json", report, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    source = Checkpoint.open(folder / "checkpoint", mtp=False)
    config = replace(source.config, balance_weight=0.0)
    output, saved = forward(source.load(), TOKENS, config)
    expect_equal(out, backward(saved))
    assert read(out)["out/loss"] == output.loss
    assert f"loss {output.loss:.9g}" in done.stdout
    lines = done.stdout.splitlines()
    assert (
        "differs from hf: gate_epsilon 0.0, hf 1e-20; latent_eps 'config', hf 'class_default'"
        in lines[1]
    )
    assert [line.split("  ")[0] for line in lines[5:11]] == [
        "embedding",
        "layer 0",
        "layer 1",
        "layer 2",
        "final norm",
        "head",
    ]
    numbers = sum(x.size for x in backward(saved).values())
    assert re.match(
        rf"89 gradients, {numbers:,} numbers, norm [\d.]+, all finite; .* s; in ", lines[-1]
    )
    result = json.loads(report.read_text())
    assert result["ok"] is True
    np.testing.assert_allclose(result["loss"], float(output.loss))
    assert sum(result["loads"]["1"]) == TOKENS.size * CONFIG.top_k
    entry = result["gradients"]["model.layers.1.mlp.gate.weight"]
    np.testing.assert_allclose(
        entry["norm"], np.linalg.norm(backward(saved)["model.layers.1.mlp.gate.weight"]), 1e-5
    )


@pytest.mark.parametrize("name", ["v2-greedy", "v2-group-limited", "v3", "v3-moonlight"])
def test_against_hugging_face(name: str, run: Any, tmp_path: Path) -> None:
    """On checkpoints that transformers saved, its own logits, loss and gradients, which it computed
    in float64."""
    inputs, theirs = golden_values(GOLDEN / name)
    given: list[Any] = []
    for option, x in inputs.items():
        np.save(tmp_path / f"{option}.npy", x)
        given += [f"--{option.replace('_', '-')}", tmp_path / f"{option}.npy"]
    code, printed, error = run(
        "--out",
        tmp_path / "out",
        "--dtype",
        "float64",
        "--convention",
        "hf",
        *given,
        checkpoint=str(GOLDEN / name),
        tokens=None,
    )
    assert code == 0, error
    assert "conventions: hf; the same as hf here" in printed
    found, gradients = read(tmp_path / "out"), {}
    for ours, x in theirs.grads.items():
        parts = [f"grad/{part}" for part in stored_names(ours, x.shape)]
        gradients[ours] = (
            np.stack([found.pop(part) for part in parts]) if len(parts) > 1 else found.pop(parts[0])
        )
    assert not [left for left in found if left.startswith("grad/")]
    assert_agree(Values(found["out/logits"], float(found["out/loss"]), gradients), theirs)


def test_every_option(folder: Path, run: Any, tmp_path: Path) -> None:
    """MTP, balance, float64, conventions, masks, targets, flash: what the model makes of the
    same."""
    rng = np.random.default_rng(1)
    targets, mask = rng.integers(0, 256, TOKENS.shape), rng.integers(0, 2, TOKENS.shape)
    targets[0, :3] = -100
    key_mask = np.arange(10) < [[10], [8]]
    np.save("targets.npy", targets)
    np.save("mask.npy", mask)
    Path("key_mask.json").write_text(json.dumps(key_mask.tolist()))
    code, printed, error = run(
        "--out",
        tmp_path / "out",
        "--mtp",
        "--mtp-weight",
        "0.1",
        "--balance-alpha",
        "0.02",
        "--dtype",
        "float64",
        "--convention",
        "hf",
        "--targets",
        "targets.npy",
        "--mask",
        "mask.npy",
        "--key-mask",
        "key_mask.json",
        "--implementation",
        "flash",
        "--activations",
        "*.self_attn",
    )
    assert code == 0, error
    assert "conventions: hf; the same as hf here" in printed
    assert "MTP, layer 4" in printed
    source = Checkpoint.open("checkpoint", dtype="float64", conventions=CONVENTIONS["hf"])
    config = replace(source.config, balance_weight=0.02, mtp_weight=0.1)
    from refimpl.ops import IMPLEMENTATIONS

    output, saved = forward(
        source.load(),
        TOKENS,
        config,
        targets=np.maximum(targets, 0),
        mask=(mask == 1) & (targets >= 0),
        key_mask=key_mask,
        ops=IMPLEMENTATIONS["flash"],
    )
    expect_equal(tmp_path / "out", backward(saved))
    assert read(tmp_path / "out")["out/loss"] == output.loss


def test_routes_of_another_run(folder: Path, run: Any, tmp_path: Path) -> None:
    """A result's routes, by folder or by file, are taken over by a model that would choose
    others."""
    assert run("--out", tmp_path / "short", "--layers", "2")[0] == 0
    assert run("--out", tmp_path / "first", "--convention", "paper")[0] == 0
    assert run("--out", tmp_path / "again", "--routes", tmp_path / "first")[0] == 0
    assert run("--out", tmp_path / "two", "--layers", "2", "--routes", tmp_path / "first")[0] == 0
    first = read(tmp_path / "first")
    changed = {n: (x + 1) % 8 for n, x in first.items() if n.startswith("aux/routes.")}
    save_file(changed, tmp_path / "changed.safetensors")
    assert run("--out", tmp_path / "other", "--routes", tmp_path / "changed.safetensors")[0] == 0
    again, other = read(tmp_path / "again"), read(tmp_path / "other")
    assert all(np.array_equal(x, again[name]) for name, x in first.items())
    assert all(np.array_equal(other[name], x) for name, x in changed.items())
    assert other["out/loss"] != first["out/loss"]
    code, _, error = run("--out", tmp_path / "x", "--routes", tmp_path / "short")
    assert (code, error) == (
        2,
        "refimpl: --routes must have every MoE layer of the model, lacks 2\n",
    )


def test_a_recipe_of_fp8(run: Any, tmp_path: Path) -> None:
    """Its choices change the gradients, are recorded, and tell a request from others."""
    args, found = ("--implementation", "fp8", "--only", "*.layers.0.*"), {}
    for name, more in {"plain": (), "ue8m0": ("--fp8", "scale=ue8m0,promote=0")}.items():
        code, _, error = run("--out", tmp_path / name, *args, *more, "--json", tmp_path / "j.json")
        assert code == 0, error
        recipe = json.loads((tmp_path / "j.json").read_text())["settings"]["fp8"]
        index = json.loads((tmp_path / name / "index.json").read_text())
        assert recipe == index["metadata"]["request"]["fp8"]
        found[name] = recipe["scale"], recipe["promote"], read(tmp_path / name)
    assert found["plain"][:2] == ("float32", 128)
    assert found["ue8m0"][:2] == ("ue8m0", 0)
    name = next(x for x in found["plain"][2] if x.endswith("q_a_proj.weight"))
    assert not np.array_equal(found["plain"][2][name], found["ue8m0"][2][name])
    code, _, error = run("--out", tmp_path / "plain", *args, "--fp8", "scale=ue8m0")
    assert code == 2
    assert "--force" in error


def test_one_gradient(run: Any, tmp_path: Path) -> None:
    _, printed, _ = run("--out", tmp_path / "out", "--only", "lm_head.weight")
    assert "\n1 gradient, 5,120 numbers, norm " in printed


def test_dlogits(folder: Path, run: Any, tmp_path: Path) -> None:
    dlogits = np.random.default_rng(2).normal(size=(2, 10, 256)).astype(np.float32)
    np.save("dlogits.npy", dlogits)
    assert run("--out", tmp_path / "out", "--dlogits", "dlogits.npy", "--no-logits")[0] == 0
    source = Checkpoint.open("checkpoint", mtp=False)
    _, saved = forward(source.load(), TOKENS, source.config, with_loss=False)
    expect_equal(tmp_path / "out", backward(saved, dlogits=dlogits))
    assert not (tmp_path / "out" / "logits.safetensors").exists()


def test_grpo(folder: Path, run: Any, tmp_path: Path) -> None:
    """In three lines of the user's, with units, documents and positions: what the library makes of
    the same; the index names the checkpoint."""
    mask = np.arange(10) < [[9], [6]]
    old = np.full(TOKENS.shape, -5.0, np.float32)
    arrays = {"mask": mask.astype(np.int64), "advantages": np.float32([1, -2]), "old_log_prob": old}
    settings = {"preset": "dapo", "temperature": 0.8}
    save_file(arrays, tmp_path / "grpo.safetensors", metadata={"settings": json.dumps(settings)})
    segments, positions = np.repeat([[0, 1]], 5, axis=1) + np.zeros((2, 1), int), np.arange(10) * 2
    np.save("segments.npy", segments)
    np.save("positions.npy", positions)
    mask &= np.arange(10) != 4  # the end of a document
    code, _, error = run(
        "--out",
        tmp_path / "x",
        "--grpo",
        tmp_path / "grpo.safetensors",
        "--segments",
        "segments.npy",
    )
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("refimpl: --grpo: its mask must be False where no target can count")
    save_file(
        arrays | {"mask": mask},
        tmp_path / "grpo.safetensors",
        metadata={"settings": json.dumps(settings)},
    )
    code, _, error = run(
        "--out",
        tmp_path / "out",
        "--grpo",
        tmp_path / "grpo.safetensors",
        "--segments",
        "segments.npy",
        "--positions",
        "positions.npy",
        "--units",
        "bfloat16,float32",
    )
    assert (code, error) == (0, "")
    policy = GRPO(
        mask, np.float64([1, -2]), old.astype(float), temperature=0.8, settings=GRPO_PRESETS["dapo"]
    )
    loss, gradients = loss_and_grads(
        "checkpoint", TOKENS, dtype="float32", grpo=policy, segments=segments, positions=positions
    )
    found = read(tmp_path / "out")
    assert found["out/loss"] == loss
    assert all(np.array_equal(found[f"grad/{name}"], x) for name, x in gradients.items())
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["metadata"]["request"]["grpo"]["clip"] == [0.2, 0.28]
    assert index["metadata"]["checkpoint"] == {
        "path": str(folder / "checkpoint"),
        "fingerprint": content_fingerprint(folder / "checkpoint"),
    }
    assert index["tensors"]["grad/model.norm.weight"]["units"].keys() == {"bfloat16", "float32"}


def test_text(folder: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, given or in a file, becomes the tokens of the checkpoint's own tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {
        word: n for n, word in enumerate(["unknown", "every", "gradient", "derived", "by", "hand"])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "unknown"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    code, _, error = run("--out", tmp_path / "x", "--text", "by hand", tokens=None)
    assert (code, error.count("\n")) == (2, 1)
    assert error == "refimpl: checkpoint has no tokenizer.json: give token ids with --tokens FILE\n"
    try:
        tokenizer.save("checkpoint/tokenizer.json")
        Path("text.txt").write_text("every gradient derived by machine")
        assert run("--out", tmp_path / "a", "--text", "hand derived", tokens=None)[0] == 0
        assert run("--out", tmp_path / "b", "--text", "text.txt", tokens=None)[0] == 0
        assert read(tmp_path / "a")["in/tokens"].tolist() == [[5, 3]]
        long = "hand " * 60  # too long for the name of a file, so a text
        assert run("--out", tmp_path / "long", "--text", long, tokens=None)[0] == 0
        assert read(tmp_path / "long")["in/tokens"].tolist() == [[5] * 60]
        assert read(tmp_path / "b")["in/tokens"].tolist() == [[1, 2, 3, 4, 0]]
        for text, shape in {"": (1, 0), "hand": (1, 1)}.items():
            code, _, error = run("--out", tmp_path / "c", "--text", text, tokens=None)
            wrong = f"its tokens must have shape (B, T) with T of at least 2, got {shape}"
            assert (code, error) == (2, f"refimpl: --text: {wrong}\n")
        Path("text.txt").write_bytes(b"\xff")
        code, _, error = run("--out", tmp_path / "c", "--text", "text.txt", tokens=None)
        assert (code, error) == (
            2,
            "refimpl: --text text.txt must be UTF-8: invalid start byte at byte 0\n",
        )
        Path("checkpoint/tokenizer.json").write_text("{}")
        code, _, error = run("--out", tmp_path / "c", "--text", "by hand", tokens=None)
        assert (code, error.count("\n")) == (2, 1)
        assert "checkpoint/tokenizer.json is not a tokenizer" in error
    finally:
        Path("checkpoint/tokenizer.json").unlink()


def test_long_text_is_text(tmp_path: Path) -> None:
    """Longer than a file's name or a path may be, it is no file's name."""
    byte_level(tmp_path)
    for length in (255, 256, 4095, 4096, 100_000):
        assert text_tokens("x" * length, tmp_path).shape == (1, length)


def test_text_without_the_package(
    folder: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    Path("checkpoint/tokenizer.json").write_text("{}")
    code, _, error = run("--out", tmp_path / "x", "--text", "by hand", tokens=None)
    Path("checkpoint/tokenizer.json").unlink()
    assert (code, error.count("\n")) == (2, 1)
    assert "text needs the package tokenizers (pip install -e '.[text]')" in error


def test_a_gradient_that_is_not_finite(folder: Path, run: Any, tmp_path: Path) -> None:
    """Exit code 1, and its name: the files are there to look at."""
    params = Checkpoint.open("plain").load()
    params["model.layers.2.self_attn.o_proj.weight"][3, 4] = np.inf
    save_checkpoint(params, replace(CONFIG, mtp_depth=0), tmp_path / "broken", dtype="float32")
    with np.errstate(all="ignore"):
        code, printed, _ = run(
            "--out",
            tmp_path / "out",
            "--json",
            tmp_path / "r.json",
            checkpoint=str(tmp_path / "broken"),
        )
    assert code == 1
    assert re.search(r"\d+ gradients are not finite, model.embed_tokens.weight the first", printed)
    assert json.loads((tmp_path / "r.json").read_text())["ok"] is False


def test_report_of_a_balance_loss(run: Any, tmp_path: Path) -> None:
    """The JSON has each layer's part, which the loss has beside the main one."""
    report = tmp_path / "report.json"
    asked = ("--balance-alpha", "0.5", "--json", report)
    code, _, error = run("--out", tmp_path / "out", *asked, checkpoint="plain")
    assert (code, error) == (0, "")
    result = json.loads(report.read_text())
    assert list(result["balance"]) == ["1", "2"]
    parts = list(result["balance"].values())
    assert min(parts) > 0.1
    assert abs(result["loss"] - result["main"] - sum(parts)) <= 1e-6 * result["loss"]


def test_no_warnings_before_the_line(folder: Path, tmp_path: Path) -> None:
    """Weights that overflow: NumPy says nothing of its own, the table and exit code 1 say all."""
    params = random_parameters(CONFIG)
    params["model.layers.1.self_attn.o_proj.weight"][0] = np.inf
    save_checkpoint(params, CONFIG, tmp_path / "infinite", dtype="float32")
    arguments = "--checkpoint", tmp_path / "infinite", "--tokens", folder / "tokens.npy"
    done = refimpl_process("grads", *arguments, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (1, "")
    assert "are not finite" in done.stdout


def test_large_gradients(run: Any, tmp_path: Path) -> None:
    """Squares that overflow make no gradient infinite, and the norms are right; float32 can't hold
    such dlogits."""
    dlogits = np.random.default_rng(2).normal(size=(2, 10, 256))
    np.save(tmp_path / "plain.npy", dlogits)
    np.save(tmp_path / "large.npy", 2.0**1000 * dlogits)
    reports, printed = {}, {}
    for name in ("plain", "large"):
        code, printed[name], error = run(
            "--out",
            tmp_path / name,
            "--dlogits",
            tmp_path / f"{name}.npy",
            "--dtype",
            "float64",
            "--json",
            tmp_path / f"{name}.json",
        )
        assert (code, error) == (0, "")
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())["gradients"]
    assert ", all finite; " in printed["large"]
    assert "inf" not in printed["large"].replace("all finite", "")
    for name, size in reports["plain"].items():
        for part in ("norm", "largest"):
            np.testing.assert_allclose(reports["large"][name][part] / 2.0**1000, size[part], 1e-12)
    code, _, error = run("--out", tmp_path / "o", "--dlogits", tmp_path / "large.npy")
    assert (code, error) == (2, "refimpl: --dlogits has numbers that float32 can't hold\n")
    assert not (tmp_path / "o").exists()


def test_what_hf_does_otherwise(run: Any, tmp_path: Path) -> None:
    """Only conventions that make a difference to this model are named."""
    params = Checkpoint.open("plain", dtype="float64").load()
    config = replace(CONFIG, mtp_depth=0, norm_eps=1e-6, normalise_weights=False)
    save_checkpoint(params, config, tmp_path / "same")
    _, printed, _ = run("--out", tmp_path / "a", checkpoint=str(tmp_path / "same"))
    assert "conventions: official; the same as hf here" in printed
    within = replace(config, max_positions=16, yarn=Yarn(original=16))
    save_checkpoint(params, within, tmp_path / "within")
    _, printed, _ = run("--out", tmp_path / "b", checkpoint=str(tmp_path / "within"))
    assert "differs from hf: yarn_when 'beyond_original', hf 'always'\n" in printed


def test_left_padding_as_hugging_face(tmp_path: Path) -> None:
    """transformers 5.24 (eager, labels of −100 at padding, position_ids from the first real token)
    counts that token, predicted from padding; otherwise the mask is an error that names the place.
    """
    given = [f"--{name.replace('_', '-')}" for name in ("tokens", "key_mask", "mask")]
    files = [LEFT / f"{name}.npy" for name in ("tokens", "key_mask", "mask")]
    inputs = [argument for pair in zip(given, files, strict=True) for argument in pair]
    base = ["grads", "--checkpoint", LEFT]
    done = refimpl_here(*base, *inputs, "--out", tmp_path / "o", "--convention", "hf")
    assert done.returncode == 0, done.stderr
    printed = re.search(r"conventions: hf; the same as hf here\nloss ([\d.]+)\n", done.stdout)
    assert printed is not None
    assert abs(float(printed[1]) - 4.87113762) < 2e-6  # the last digits are BLAS's
    theirs = load_file(LEFT / "outputs.safetensors")
    ours = {}
    for file in (tmp_path / "o").glob("*.safetensors"):
        ours |= load_file(file)
    for name, x in theirs.items():
        if name.startswith("grad/"):
            assert np.abs(ours[name] - x).max() <= 2e-6 * np.abs(x).max(), name
    done = refimpl_here(*base, *inputs, "--out", tmp_path / "p")
    assert done.returncode == 2
    assert done.stderr.startswith("refimpl: --mask must be False where no target can count")
    assert done.stderr.endswith("got True in row 1, position 7\n")
    hidden = np.load(files[2])
    hidden[1, 7] = False
    np.save(tmp_path / "mask.npy", hidden)
    for number, convention in enumerate(("official", "hf")):
        inputs[-1], out = tmp_path / "mask.npy", tmp_path / f"hidden{number}"
        done = refimpl_here(*base, *inputs, "--out", out, "--convention", convention)
        assert "loss 4.89847" in done.stdout
    done = refimpl_here(*base, *inputs[:-2], "--out", tmp_path / "q")
    assert "target_after_padding False, hf True" in done.stdout


def test_one_row_of_tokens(tmp_path: Path) -> None:
    """A list of tokens stands for a batch of one, as in `generate`; its masks too."""
    (tmp_path / "flat.json").write_text("[3, 1, 4, 1, 5]")
    (tmp_path / "mask.json").write_text("[0, 1, 1, 1, 0]")
    np.save(tmp_path / "row.npy", np.array([[3, 1, 4, 1, 5]]))
    np.save(tmp_path / "mask.npy", np.array([[0, 1, 1, 1, 0]]))
    losses = []
    for tokens, mask in (("flat.json", "mask.json"), ("row.npy", "mask.npy")):
        inputs = ["--tokens", tokens, "--mask", mask, "--out", tokens[:3]]
        done = refimpl_here("grads", "--checkpoint", LEFT, *inputs, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append([line for line in done.stdout.splitlines() if line.startswith("loss")])
    assert losses[0] == losses[1] != []


def test_indexers_are_left_out_and_said(tmp_path: Path) -> None:
    """V3.2's checkpoint is V3's up to index_topk tokens; a longer text is refused."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(LEFT, folder)
    content = json.loads((LEFT / "config.json").read_text())
    content |= {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}
    tokens = ["--tokens", LEFT / "tokens.npy", "--out", tmp_path / "out"]
    for most, code in ((19, 2), (20, 0)):
        (folder / "config.json").write_text(json.dumps(content | {"index_topk": most}))
        done = refimpl_here("grads", "--checkpoint", folder, *tokens)
        assert done.returncode == code
        if code == 0:
            assert "indexers left out: with up to 20 tokens they choose every key" in done.stdout
        else:
            assert "--tokens must have shape (B, T) with T at most index_topk=19" in done.stderr
    prompt = ["--tokens", tmp_path / "prompt.json", "--max-tokens", 100]
    (tmp_path / "prompt.json").write_text("[1, 2, 3]")
    done = refimpl_here("generate", "--checkpoint", folder, *prompt, "--stop", 119)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) <= 17
    assert "indexers left out: with up to 20 tokens" in done.stderr


def test_conventions_that_matter() -> None:
    """Each field that changes a model's loss is named, and none that can't change it. A new field
    fails here until `differing` considers it."""
    neutral = replace(
        CONFIG,
        mtp_depth=0,
        groups=1,
        keep_groups=1,
        balance_weight=0.0,
        normalise_weights=False,
        norm_eps=1e-6,
        yarn=None,
    )
    assert CONFIG.yarn is not None
    half_given = CONFIG.yarn._replace(mscale=0.9, mscale_all_dim=0.0)
    configs = [
        neutral,
        CONFIG,
        replace(CONFIG, mtp_depth=0),
        replace(CONFIG, gate="softmax"),
        replace(CONFIG, yarn=half_given),
        replace(neutral, yarn=half_given, max_positions=16),
        replace(neutral, yarn=CONFIG.yarn, max_positions=16),
    ]
    rng, found = np.random.default_rng(0), set()
    for config in configs:
        params = {
            name: 0.3 * rng.normal(size=shape)
            - name.endswith("correction_bias")  # so that a group at 0 is chosen
            for name, shape in parameter_shapes(config).items()
        }
        loss = forward(params, TOKENS, config)[0].loss
        for name, hint in get_type_hints(Conventions).items():
            for value in {bool: (True,), float: (0.5,)}.get(hint, get_args(hint)):
                other = replace(Conventions(), **{name: value})
                named = differing(config, other)
                assert set(named) <= {name}
                changed = (
                    forward(params, TOKENS, replace(config, conventions=other))[0].loss != loss
                )
                assert named or not changed or name == "rope_layout", (name, value)
                assert not named or config is not neutral, (name, value)
                found |= {name for _ in named if changed}
    of_padding = {"target_after_padding", "blind_query"}  # which this batch does not have
    never = {"bias_centre", "rope_layout"} | of_padding
    assert found == {f.name for f in fields(Conventions)} - never
    assert "target_after_padding" in differing(CONFIG, CONVENTIONS["hf"], after_padding=True)
    within = replace(neutral, yarn=half_given._replace(mscale=1.0), max_positions=16)
    assert differing(within, CONVENTIONS["hf"]) == [
        "yarn_when"
    ]  # which alone makes the factor another


def test_progress_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    """A bar with the step at work on a terminal's standard error; nothing of it on standard
    output."""
    import pty

    leader, follower = pty.openpty()
    arguments = "--checkpoint", "checkpoint", "--tokens", "tokens.npy", "--out", tmp_path / "out"
    done = refimpl_process("grads", *arguments, stderr=follower, cwd=folder)
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "gradients" in shown
    assert "10/10" in shown
    assert done.stdout.startswith("refimpl ")


BAD = [
    (["--out", "o"], None, "give either --tokens FILE or --text TEXT"),
    (["--out", "o", "--text", "x"], "tokens.npy", "give either --tokens FILE or --text TEXT"),
    (
        ["--out", "o"],
        "missing.npy",
        "--tokens missing.npy can't be read: No such file or directory",
    ),
    (["--out", "o"], "tokens.txt", "--tokens tokens.txt must be a .npy or a .json file"),
    (["--out", "o"], "broken.npy", "--tokens broken.npy is not an array"),
    (["--out", "o"], "broken.json", "--tokens broken.json is not JSON"),
    (["--out", "o"], "ragged.json", "--tokens ragged.json is not an array"),
    (
        ["--out", "o"],
        "object.json",
        "--tokens object.json must hold integers [batch, time], got object []",
    ),
    (
        ["--out", "o"],
        "empty.json",
        "--tokens empty.json must hold integers [batch, time], got float64 [0]",
    ),
    (
        ["--out", "o"],
        "deep.json",
        "--tokens deep.json must hold integers [batch, time], got int64 [1, 1, 3]",
    ),
    (
        ["--out", "o"],
        "float.npy",
        "--tokens float.npy must hold integers [batch, time], got float64 [2, 10]",
    ),
    (["--out", "o"], "pickle.npy", "--tokens pickle.npy is not an array"),
    (["--out", "o"], "zip.npy", "--tokens zip.npy must hold one array"),
    (["--out", "o"], "endless.npy", "--tokens endless.npy is not an array: it is cut off"),
    (["--out", "o"], "open.npy", "--tokens open.npy is not an array"),
    (["--out", "o"], "large.json", "--tokens must lie in 0…255, got 1…256"),
    (["--out", "o"], "negative.json", "--tokens must lie in 0…255, got -1…3"),
    (
        ["--out", "o"],
        "one.json",
        "--tokens must have shape (B, T) with T of at least 2, got (1, 1)",
    ),
    (
        ["--out", "o", "--mask", "flat.json"],
        "tokens.npy",
        "--mask must have shape (B, T)=(2, 10), got (1, 3)",
    ),
    (["--out", "o", "--mask", "tokens.npy"], "tokens.npy", "--mask tokens.npy must hold 0 and 1"),
    (
        ["--out", "o", "--fp8", "scale=ue8m0"],
        "tokens.npy",
        "--fp8 needs the implementation fp8, got reference",
    ),
    (
        ["--out", "o", "--implementation", "fp8", "--fp8", "promote=100"],
        "tokens.npy",
        "--fp8 promote must be a multiple of 128, or 0 for never, got 100",
    ),
    (
        ["--out", "o", "--mask", "ones.json"],
        "tokens.npy",
        "--mask must have shape (B, T)=(2, 10), got (1, 3)",
    ),
    (
        ["--out", "o", "--key-mask", "ones.json"],
        "tokens.npy",
        "--key-mask must have shape (B, T)=(2, 10), got (1, 3)",
    ),
    (
        ["--out", "o", "--mask", "zeros.npy"],
        "tokens.npy",
        "--mask must leave at least one target that counts",
    ),
    (
        ["--out", "o", "--key-mask", "zeros.npy"],
        "tokens.npy",
        "--key-mask must leave at least one target that counts",
    ),
    (
        ["--out", "o", "--mask", "zeros.npy", "--key-mask", "zeros.npy"],
        "tokens.npy",
        "--mask and key_mask must leave at least one target that counts",
    ),
    (
        ["--out", "o", "--mask", "ones.npy"],
        "tokens.npy",
        "--mask must be False where no target can count (behind the last token, at padding, at the "
        "end of a document), got True in row 0, position 9",
    ),
    (
        ["--out", "o"],
        "unsigned.json",
        "unsigned.json must hold integers that fit into int64, got 18446744073709551615",
    ),
    (
        ["--out", "o"],
        "unsigned.npy",
        "unsigned.npy must hold integers that fit into int64, got 18446744073709551516",
    ),
    (
        ["--out", "o", "--targets", "unsigned.npy"],
        "tokens.npy",
        "--targets unsigned.npy must hold integers that fit",
    ),
    (
        ["--out", "o"],
        "true.json",
        "--tokens true.json must hold integers [batch, time], got true or false among them",
    ),
    (
        ["--out", "o", "--targets", "ones.json"],
        "tokens.npy",
        "--targets must have the tokens' shape (2, 10), got",
    ),
    (
        ["--out", "o", "--targets", "far.npy"],
        "tokens.npy",
        "--targets must lie in 0…255, got 0…999",
    ),
    (
        ["--out", "o", "--dlogits", "float.npy"],
        "tokens.npy",
        "--dlogits must have shape (B, T, W)=(2, 10, 256), got",
    ),
    (
        ["--out", "o", "--dlogits", "nan.npy"],
        "tokens.npy",
        "--dlogits must be finite, got NaN or infinity",
    ),
    *(
        (
            ["--out", "o", "--dlogits", "flat.npy", *other],
            "tokens.npy",
            "--dlogits is the gradient of another loss: it cannot be combined with mtp, "
            "balance_alpha, mask or targets",
        )
        for other in (
            ["--mtp"],
            ["--balance-alpha", "1"],
            ["--mask", "ones.npy"],
            ["--targets", "tokens.npy"],
        )
    ),
    (
        ["--out", "o", "--routes", "broken.npy"],
        "tokens.npy",
        "broken.npy is not a safetensors file",
    ),
    (
        ["--out", "o", "--routes", "none.safetensors"],
        "tokens.npy",
        "must hold aux/routes.L as int64 or int32",
    ),
    (
        ["--out", "o", "--routes", "bf16.safetensors"],
        "tokens.npy",
        "bf16.safetensors must hold aux/routes.1 as int64 or int32, got bfloat16",
    ),
    (["--out", "o"], "pipe.npy", "--tokens pipe.npy can't be read: not a regular file"),
    (["--out", "o"], "many.npy", "--tokens many.npy must hold at most 16,777,216 tokens, got"),
    (
        ["--out", "o", "--mask", "many.npy"],
        "tokens.npy",
        "--mask must have shape (B, T)=(2, 10), got (1, 1073741824)",
    ),
    (
        ["--out", "o", "--dlogits", "many.npy"],
        "tokens.npy",
        "--dlogits must have shape (B, T, W)=(2, 10, 256), got (1, 1073741824)",
    ),
    (["--out", "o"], "many.json", "many.json must hold at most 25,000,000 bytes, got"),
    (
        ["--out", "o", "--routes", "twice.safetensors"],
        "tokens.npy",
        "--routes of layer 1 must name an expert once",
    ),
    (
        ["--out", "o", "--routes", "short.safetensors"],
        "tokens.npy",
        "(routes) must have shape (B, T, K)=(2, 10, 3)",
    ),
    *(
        (["--out", "o", "--routes", f"layer-{number}.safetensors"], "tokens.npy", message)
        for number, message in enumerate(
            (
                "must hold aux/routes.L with a layer's number L, holds aux/routes.01",
                r"must hold aux/routes.L with a layer's number L, holds aux/routes.\u0662",
                "must hold aux/routes.L with a layer's number L, holds aux/routes.999",
                "must hold aux/routes.L with a layer's number L, holds aux/routes.",
                "--routes must name the model's MoE layers, with mtp also those of its modules, "
                "got layer 0, 7",
                "--routes must name the model's MoE layers, with mtp also those of its modules, "
                "got layer 3",
            )
        )
    ),
    (["--out", "o", "--layers", "0"], "tokens.npy", "--layers must lie in 1…3, got 0"),
    (["--out", "o", "--layers", "4"], "tokens.npy", "--layers must lie in 1…3, got 4"),
    (
        ["--out", "o", "--layers", "2", "--mtp"],
        "tokens.npy",
        "--layers cannot be combined with mtp, which reads the last layer",
    ),
    (
        ["--out", "o", "--only", "nothing.*"],
        "tokens.npy",
        "--only must match the name of a gradient, got nothing.*",
    ),
    (
        ["--out", "o", "--activations", "x"],
        "tokens.npy",
        "--activations must match a name such as model.embed_tokens",
    ),
    (
        ["--out", "o", "--balance-alpha", "-1"],
        "tokens.npy",
        "--balance-alpha must be a number of at least 0, got -1.0",
    ),
    (["--out", "o", "--mtp-weight", "0.3"], "tokens.npy", "--mtp-weight needs --mtp"),
    (
        ["--out", "o", "--dtype", "bfloat16"],
        "tokens.npy",
        "--dtype must be one of float32, float64, got bfloat16",
    ),
    (
        ["--out", "o", "--convention", "x"],
        "tokens.npy",
        "--convention must be one of official, paper, hf, got x",
    ),
    (
        ["--out", "o", "--implementation", "x"],
        "tokens.npy",
        "--implementation must be one of reference, flash",
    ),
    (
        ["--out", "o", "--positions", "flat.json"],
        "tokens.npy",
        "--positions must have shape (B, T) or (T,)=(2, 10), got (3,)",
    ),
    (
        ["--out", "o", "--segments", "flat.json"],
        "tokens.npy",
        "--segments must have shape (B, T)=(2, 10), got (1, 3)",
    ),
    (
        ["--out", "o", "--units", "float64"],
        "tokens.npy",
        "--units of float64 need results of that type to compare with, got float32",
    ),
    (
        ["--out", "o", "--units", "float16"],
        "tokens.npy",
        "--units must be among float64, float32, bfloat16, got float16",
    ),
    (
        ["--out", "o", "--activations", "*.self_attn.q", "--implementation", "flash"],
        "tokens.npy",
        "--activations inside attention are those of the implementation reference, got flash",
    ),
    *(
        (["--out", "o", "--grpo", f"grpo-{number}.safetensors"], "tokens.npy", message)
        for number, message in enumerate(
            (
                "--grpo grpo-0.safetensors must hold mask and advantages, lacks mask",
                "--grpo grpo-1.safetensors must hold mask and advantages, lacks advantages",
                "alone, holds colour",
                "--grpo grpo-3.safetensors must hold 0 and 1 as mask, got other numbers",
                "--grpo grpo-4.safetensors must hold floating advantages, got int64",
                "--grpo grpo-5.safetensors: settings is not JSON",
                "--grpo grpo-6.safetensors: settings must be a JSON object",
                "--grpo grpo-7.safetensors: settings: clips must be one of preset, temperature, "
                "clip, dual_clip",
                "--grpo grpo-8.safetensors: settings: preset must be one of deepseekmath, ",
                "--grpo can't be computed: temperature must be above 0 and finite, got 0",
                "--grpo must leave at least one target that counts",
                "--grpo: its mask must be False where no target can count",
                "--grpo can't be computed: advantages must have shape (B,)=(2,), got (1,)",
                "--grpo can't be computed: reference_log_prob must be given unless kl_weight is 0",
            )
        )
    ),
    (
        ["--out", "o", "--grpo", "grpo-13.safetensors", "--mtp"],
        "tokens.npy",
        "--grpo has its own loss and mask: it cannot be combined with mtp, mask or dlogits",
    ),
    (["--out", "o", "--grpo", "broken.npy"], "tokens.npy", "broken.npy is not a safetensors file"),
    (
        ["--out", "checkpoint"],
        "tokens.npy",
        "checkpoint holds other things (config.json): give another folder",
    ),
    (["--out", "tokens.npy"], "tokens.npy", "tokens.npy can't be written: File exists"),
    (["--out", "tokens.npy/o"], "tokens.npy", "tokens.npy/o can't be written: Not a directory"),
    (["--out", "/proc/o"], "tokens.npy", "/proc/o can't be written"),
    (["--out", "o", "--json", "no/such"], "tokens.npy", "--json no/such can't be written"),
]


@pytest.mark.parametrize(("arguments", "tokens", "message"), BAD, ids=range(len(BAD)))
def test_could_not_run(
    folder: Path, run: Any, arguments: list[str], tokens: str | None, message: str
) -> None:
    """One line on standard error, exit code 2, and no folder is made."""
    for name, content in {
        "broken.npy": "x",
        "broken.json": "[1",
        "ragged.json": "[[1, 2], [3]]",
        "object.json": '{"a": 1}',
        "empty.json": "[]",
        "flat.json": "[1, 2, 3]",
        "deep.json": "[[[1, 2, 3]]]",
        "large.json": "[[1, 256]]",
        "negative.json": "[[3, -1]]",
        "one.json": "[[1]]",
        "true.json": "[[1, 2, true]]",
        "unsigned.json": f"[[{2**64 - 1}, {2**64 - 1}]]",
        "ones.json": "[[1, 1, 1]]",
        "tokens.txt": "1 2 3",
    }.items():
        Path(name).write_text(content)
    np.save("float.npy", TOKENS.astype(float))
    np.save("zeros.npy", np.zeros_like(TOKENS))
    np.save(
        "unsigned.npy", np.where(TOKENS > 100, np.uint64(2**64 - 100), TOKENS.astype(np.uint64))
    )
    np.save("ones.npy", np.ones_like(TOKENS))
    np.save("flat.npy", np.zeros((2, 10, 256)))
    np.save("far.npy", np.arange(20).reshape(2, 10) // 19 * 999)
    np.save("nan.npy", np.full((2, 10, 256), np.nan))
    np.save("pickle.npy", np.array([{"a": 1}]), allow_pickle=True)
    for name, shape in {"endless.npy": f"({10**15},)}}", "open.npy": "(((("}.items():
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}\n".encode()
        Path(name).write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with Path("zip.npy").open("wb") as file:
        np.savez(file, a=TOKENS)
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1073741824), }\n"
    Path("many.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    os.truncate("many.npy", 10 + len(header) + 8 * 2**30)  # sparse: it takes no space
    Path("many.json").touch()
    os.truncate("many.json", 2**32)
    if not Path("pipe.npy").exists():
        os.mkfifo("pipe.npy")
    routes = np.broadcast_to(np.arange(3), (2, 10, 3)).copy()
    low = routes.astype(ml_dtypes.bfloat16)
    save_file({"aux/routes.1": low, "aux/routes.2": low}, "bf16.safetensors")
    save_file({"x": routes}, "none.safetensors")
    save_file({"aux/routes.1": 0 * routes, "aux/routes.2": routes}, "twice.safetensors")
    save_file({"aux/routes.1": routes, "aux/routes.2": routes[:, :5].copy()}, "short.safetensors")
    for number, layers in enumerate((["01"], ["\u0662"], ["9" * 5000], [""], ["7", "0"], ["3"])):
        strange = {f"aux/routes.{layer}": routes for layer in ["1", "2", *layers]}
        save_file(strange, f"layer-{number}.safetensors")
    save_wrong_policies()
    code, _, error = run(*arguments, tokens=tokens)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("refimpl: ")
    assert message in error
    assert not Path("o").exists()


def save_wrong_policies() -> None:
    """Files for --grpo, each with another mistake."""
    right = {"mask": np.arange(10) < [[9], [5]], "advantages": np.ones(2)}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"mask": None}, "{}"),
        ({"advantages": None}, "{}"),
        ({"colour": np.ones(2)}, "{}"),
        ({"mask": 2 * right["mask"].astype(int)}, "{}"),
        ({"advantages": np.ones(2, int)}, "{}"),
        ({}, "{"),
        ({}, "[]"),
        ({}, '{"clips": [1, 2]}'),
        ({}, '{"preset": ["dapo"]}'),
        ({}, '{"temperature": 0}'),
        ({"mask": np.zeros((2, 10), bool)}, '{"preset": "dapo"}'),
        ({"mask": np.ones((2, 10), bool)}, '{"preset": "dapo"}'),
        ({"advantages": np.ones(1)}, '{"preset": "dapo"}'),
        ({}, "{}"),
    ]
    for number, (change, settings) in enumerate(changes):
        arrays = {name: x for name, x in (right | change).items() if x is not None}
        save_file(arrays, f"grpo-{number}.safetensors", metadata={"settings": settings})


def test_a_checkpoint_with_a_dangling_link(folder: Path, run: Any, tmp_path: Path) -> None:
    """What tells the checkpoint from others can't be known: the message is not about --out."""
    link = folder / "checkpoint" / "old.safetensors"
    link.symlink_to("gone")
    try:
        code, _, error = run("--out", tmp_path / "o")
    finally:
        link.unlink()
    wanted = "--checkpoint: checkpoint/old.safetensors can't be read: No such file or directory"
    assert (code, error) == (2, f"refimpl: {wanted}\n")


def test_no_mtp_in_the_checkpoint(run: Any, tmp_path: Path) -> None:
    code, _, error = run("--out", tmp_path / "o", "--mtp", checkpoint="plain")
    assert (code, error.count("\n")) == (2, 1)
    assert "--mtp needs MTP modules, which the model does not have" in error


def test_resume_and_force(
    folder: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended by a full disk, the same command goes on; finished, it needs --force; another
    checkpoint is another run."""
    from refimpl.grads.folder import Folder

    out, write = tmp_path / "out", Folder.write_gradient

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def large(*args: Any) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(Folder, "write_gradient", large)
    code, _, error = run("--out", out)
    assert (code, error.count("\n")) == (2, 1)
    assert "not enough memory (Unable to allocate 9 TiB): give fewer tokens" in error
    monkeypatch.setattr(Folder, "write_gradient", full)
    code, _, error = run("--out", out)
    assert (code, error) == (2, f"refimpl: --out {out} can't be written: No space left on device\n")
    monkeypatch.setattr(Folder, "write_gradient", write)
    assert sorted(p.name for p in (out / "unfinished").glob("forward-*")) == [
        f"forward-{layer:05d}.safetensors" for layer in range(3)
    ]
    code, _, error = run("--out", out, checkpoint="plain")
    assert code == 2
    assert (
        "holds an unfinished run of another request (other checkpoint): give another folder"
        in error
    )
    assert run("--out", out)[0] == 0
    code, _, error = run("--out", out)
    assert (code, error.count("\n")) == (2, 1)
    assert "holds a finished result: give another folder, or replace it with --force" in error
    assert run("--out", out, "--force")[0] == 0
