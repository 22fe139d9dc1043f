"""The ports in examples/ are right; and wrong with a mistake, `check` names part, rows and bug."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from refimpl.port import Truth, compare_folders

from support import ROOT, refimpl_here

EXAMPLES = ROOT / "examples"
TEXT = [b"The value of a name is the object it refe", b"rs to; an assignment binds the name to it"]


@pytest.fixture(scope="session")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps([list(row) for row in TEXT]))
    out = folder / "truth"
    checkpoint = ROOT / "tests" / "golden" / "trained"
    options = ["--dtype", "float64", "--activations", "*", "--units", "float64,float32"]
    command = ["grads", "--checkpoint", checkpoint, "--tokens", tokens, "--out", out]
    done = refimpl_here(*command, *options)
    assert done.returncode == 0, done.stderr
    return out


def loaded(file: Path, change: tuple[str, str] = ("", "")) -> ModuleType:
    """An example as a module, one piece of it replaced."""
    source = file.read_text()
    assert source.count(change[0]) == 1 or not change[0]
    spec = importlib.util.spec_from_loader(file.stem, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(file)
    exec(compile(source.replace(*change), str(file), "exec"), module.__dict__)
    return module


def assert_named(file: Path, truth: Path, part: str, wrong: str, bug: str) -> None:
    """The first wrong part, its wrong rows and the planted bug stand in what `check` says."""
    verdict = compare_folders(file, truth)
    assert verdict.verdict == "FAIL"
    assert verdict.first_wrong is not None
    assert verdict.first_wrong.name == part
    said = str(verdict)
    assert wrong in said
    assert f"planted bug {bug}" in said


LAYER_NUMPY = [
    (
        "np.sum(dk[..., c.nope :], axis=2, keepdims=True)",
        "dk[..., :1, c.nope :]",
        "layer 1, attention, backward",
        "rotated key rows: wrong",
        "mla: gradient of k_pe from one head",
    ),
    (
        "dp - np.sum(dp * p, axis=-1, keepdims=True)",
        "dp",
        "layer 1, attention, backward",
        "self_attn.kv_b_proj.weight",
        "attention: no row sum in the softmax's gradient",
    ),
    (
        "(dweights - mean)",
        "dweights",
        "layer 1, network, backward",
        "cot/model.layers.1.mlp.gate.scores",
        "router: normaliser taken as a constant",
    ),
    (
        "weights[token, slot, None] * dy[token], kept",
        "dy[token], kept",
        "layer 1, network, backward",
        "experts",
        "moe: weight missing",
    ),
]


def test_numpy_layer_is_right(truth: Path, tmp_path: Path) -> None:
    module = loaded(EXAMPLES / "layer_numpy.py")
    for dtype in ("float64", "float32"):
        np.savez(tmp_path / "mine.npz", **module.run(Truth.open(truth), 1, dtype))
        verdict = compare_folders(tmp_path / "mine.npz", truth, partial=True)
        assert verdict.verdict == "PASS", verdict
        assert verdict.dtype == dtype


@pytest.mark.parametrize(
    ("right", "wrong", "part", "rows", "bug"), LAYER_NUMPY, ids=[bug for *_, bug in LAYER_NUMPY]
)
def test_numpy_layer_wrong(
    right: str, wrong: str, part: str, rows: str, bug: str, truth: Path, tmp_path: Path
) -> None:
    module = loaded(EXAMPLES / "layer_numpy.py", (right, wrong))
    np.savez(tmp_path / "mine.npz", **module.run(Truth.open(truth), 1, "float32"))
    assert_named(tmp_path / "mine.npz", truth, part, rows, bug)


FORGOTTEN = "{0} * {1}[1] * {1}[2], None"  # a norm's backward without the mean's term
ATTENTION = [  # the first wrong tensor of attention's backward: porting.md's table
    ("product(dy, flat(o))", "product(dy, flat(o.swapaxes(2, 3)))", "o_proj", ""),
    ("ds = scale * p * (dp", "ds = scale * p * p * (dp", "kv_b_proj", "key rows"),
    (
        'dv = np.einsum("bhts,bthv->bshv", p, do)',
        "dv = p.sum(2).swapaxes(1, 2)[..., None] * do",
        "kv_b_proj",
        "value rows",
    ),
    (
        'norm_backward(flat(dk_v) @ w["kv_b_proj"], latent_saved)',
        FORGOTTEN.format('(flat(dk_v) @ w["kv_b_proj"])', "latent_saved"),
        "kv_a_proj_with_mqa",
        "latent rows",
    ),
    ("rotate(shared, c, -1)", "rotate(shared, c)", "kv_a_proj_with_mqa", "rotated key rows"),
    (
        "rotate(dq[..., c.nope :], c, -1)",
        "rotate(dq[..., c.nope :], c)",
        "q_b_proj",
        "rotated rows",
    ),
    (
        'np.einsum("bhts,bshx->bthx", ds, k), ',
        'np.einsum("bhts,bshx->bthx", ds / scale, k), ',
        "q_b_proj",
        "everywhere",
    ),
    (
        'norm_backward(dq @ w["q_b_proj"], a_saved)',
        FORGOTTEN.format('(dq @ w["q_b_proj"])', "a_saved"),
        "q_a_proj",
        "",
    ),
    ('return da @ w["q_a_proj"] + dkv', "return dkv", "input_layernorm", ""),
]


@pytest.mark.parametrize(("right", "wrong", "tensor", "rows"), ATTENTION)
def test_first_wrong_of_attention_s_backward(
    right: str, wrong: str, tensor: str, rows: str, truth: Path, tmp_path: Path
) -> None:
    assert f"| `{tensor}` | {rows}".rstrip() in (ROOT / "derivations" / "porting.md").read_text()
    module = loaded(EXAMPLES / "layer_numpy.py", (right, wrong))
    mine = module.run(Truth.open(truth), 1, "float32")
    np.savez(tmp_path / "mine.npz", **{name: x for name, x in mine.items() if x is not None})
    said = str(compare_folders(tmp_path / "mine.npz", truth, partial=True))
    first = next(line for line in said.splitlines() if line.startswith("first wrong part"))
    assert "layer 1, attention, backward: grad/" in first
    assert f"{tensor}.weight" in first
    assert (f"{rows}: wrong" if rows.endswith("rows") else rows) in first


EXPAND = "k_pe.expand(-1, -1, c.heads, -1)"
MLA_TORCH = [
    (
        EXPAND,
        "torch.cat((k_pe, k_pe.detach().expand(-1, -1, c.heads - 1, -1)), dim=2)",
        "rotated key rows: wrong",
        "mla: gradient of k_pe from one head",
    ),
    (
        EXPAND,
        "(k_pe / c.heads + (k_pe - k_pe / c.heads).detach()).expand(-1, -1, c.heads, -1)",
        "rotated key rows: wrong",
        "mla: mean over heads for k_pe",
    ),
    (
        "k_pe = rotate(k_pe[:, :, None, :], turn)",
        "k_pe = k_pe[:, :, None, :] + (rotate(k_pe[:, :, None, :], turn)"
        " - k_pe[:, :, None, :]).detach()",
        "rotated key rows: wrong",
        "mla: k_pe not rotated back",
    ),
    (
        '(h @ w["kv_a_proj_with_mqa"].T)',
        '(h.detach() @ w["kv_a_proj_with_mqa"].T)',
        "input_layernorm",
        "mla: dx misses the kv path",
    ),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_torch_mla_is_right(dtype: str, truth: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch comes with the extra oracle")
    save_file = pytest.importorskip("safetensors.torch").save_file
    module = loaded(EXAMPLES / "mla_torch.py")
    for layer in (0, 2):
        save_file(
            module.run(Truth.open(truth), layer, getattr(torch, dtype)),
            tmp_path / "mine.safetensors",
        )
        verdict = compare_folders(tmp_path / "mine.safetensors", truth, partial=True)
        assert verdict.verdict == "PASS", verdict
        assert verdict.dtype == dtype


@pytest.mark.parametrize(
    ("right", "wrong", "rows", "bug"), MLA_TORCH, ids=[bug for *_, bug in MLA_TORCH]
)
def test_torch_mla_wrong(
    right: str, wrong: str, rows: str, bug: str, truth: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="torch comes with the extra oracle")
    save_file = pytest.importorskip("safetensors.torch").save_file
    module = loaded(EXAMPLES / "mla_torch.py", (right, wrong))
    save_file(module.run(Truth.open(truth), 2, torch.float32), tmp_path / "mine.safetensors")
    part = "layer 2, attention, backward"
    assert_named(tmp_path / "mine.safetensors", truth, part, rows, bug)


MOE_JAX = [
    (
        "scale * chosen / total\n",
        "scale * chosen / jax.lax.stop_gradient(total)\n",
        "cot/model.layers.2.after_attention",
        "router: normaliser taken as a constant",
    ),
    (
        "    mine = jnp.take",
        "    weights = jax.lax.stop_gradient(weights)\n    mine = jnp.take",
        "mlp.gate.weight",
        "moe: gate path missing",
    ),
    (
        "y = y + swiglu(h,",
        "y = y + swiglu(jax.lax.stop_gradient(h),",
        "cot/model.layers.2.after_attention",
        "moe: shared path missing",
    ),
    (
        "weights = scale * chosen / total\n",
        "weights = chosen / total\n"
        "    weights = weights + jax.lax.stop_gradient((scale - 1) * weights)\n",
        "mlp.gate.weight",
        "router: routed scale missing",
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_jax_moe_is_right(dtype: str, truth: Path, tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="JAX comes with the extra jax")
    module = loaded(EXAMPLES / "moe_jax.py")
    np.savez(tmp_path / "mine.npz", **module.run(Truth.open(truth), 1, dtype))
    verdict = compare_folders(tmp_path / "mine.npz", truth, partial=True)
    assert verdict.verdict == "PASS", verdict
    assert verdict.dtype == dtype


@pytest.mark.parametrize(
    ("right", "wrong", "rows", "bug"), MOE_JAX, ids=[bug for *_, bug in MOE_JAX]
)
def test_jax_moe_wrong(
    right: str, wrong: str, rows: str, bug: str, truth: Path, tmp_path: Path
) -> None:
    pytest.importorskip("jax", reason="JAX comes with the extra jax")
    module = loaded(EXAMPLES / "moe_jax.py", (right, wrong))
    np.savez(tmp_path / "mine.npz", **module.run(Truth.open(truth), 2, "float32"))
    assert_named(tmp_path / "mine.npz", truth, "layer 2, network, backward", rows, bug)


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vectors") / "vectors"
    done = refimpl_here("vectors", out, "--op", "rms_norm", "--op", "rope")
    assert done.returncode == 0, done.stderr
    return out


def in_c(vectors: Path, tmp_path: Path, change: tuple[str, str] = ("", "")) -> Path:
    """What the C functions make of the vectors, in a file."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: cc is not on PATH")
    module = loaded(EXAMPLES / "rms_norm_rope.py")
    source = (EXAMPLES / "rms_norm_rope.c").read_text()
    assert source.count(change[0]) == 1 or not change[0]
    (tmp_path / "port.c").write_text(source.replace(*change))
    np.savez(tmp_path / "mine.npz", **module.run(Truth.open(vectors), tmp_path / "port.c"))
    return tmp_path / "mine.npz"


def test_c_is_right(vectors: Path, tmp_path: Path) -> None:
    verdict = compare_folders(in_c(vectors, tmp_path), vectors)
    assert verdict.verdict == "PASS", verdict


@pytest.mark.parametrize(
    ("right", "wrong", "bug"),
    [
        ("r * (dy[j] * w[j] - x[j] * r * dot / n)", "r * dy[j] * w[j]", "rms_norm: no mean term"),
        ("x[j] * r * dot / n", "x[j] * r * dot", "rms_norm: sum for mean"),
        ("int sign,", "int unused,", "rope: backward turns the same way"),
    ],
)
def test_c_is_wrong(right: str, wrong: str, bug: str, vectors: Path, tmp_path: Path) -> None:
    if right == "int sign,":
        right, wrong = "double angle = sign *", "double angle = (sign * sign) *"
    verdict = compare_folders(in_c(vectors, tmp_path, (right, wrong)), vectors)
    assert verdict.verdict == "FAIL"
    assert f"planted bug {bug}" in str(verdict)


@pytest.mark.parametrize(
    ("file", "arguments"), [("layer_numpy.py", ["--layer", "2", "--dtype", "float64"])]
)
def test_as_a_script(file: str, arguments: list[str], truth: Path, tmp_path: Path) -> None:
    """The command that the example's own text names."""
    out = tmp_path / "mine.npz"
    command: list[Any] = [sys.executable, EXAMPLES / file, truth, out, *arguments]
    subprocess.run(command, check=True, cwd=ROOT)
    assert compare_folders(out, truth, partial=True).verdict == "PASS"
