"""Streamed gradients: the model's own, bit for bit, in files; a killed run goes on to the same;
bounded memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl.check.cases import model_variant
from refimpl.checkpoint.source import MemorySource
from refimpl.checkpoint.tensor_file import Spec, TensorWriter, read_tensor_file, write_tensor_file
from refimpl.config import Conventions, ModelConfig, preset
from refimpl.errors import CouldNotRun
from refimpl.grads import Request, Result, gradient_shapes, write_gradients
from refimpl.grads.folder import read_record
from refimpl.grads.lazy import ROWS, Rows, sum_in_blocks
from refimpl.memory import grads_memory
from refimpl.model import ModelOutput, Route, backward, forward, logits
from refimpl.ops import IMPLEMENTATIONS
from refimpl.parameters import parameter_shapes

TINY = preset("tiny")
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(0, TINY.vocabulary, (2, 12))


def parameters(config: ModelConfig, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Normal with std 0.15, norms and biases off neutral; gate biases float32 unless all is
    wider."""
    rng = np.random.default_rng(0)
    return {
        name: (
            rng.uniform(0.5, 1.5, shape)
            if name.endswith("norm.weight")
            else 0.15 * rng.normal(size=shape)
        ).astype(dtype)
        for name, shape in parameter_shapes(config).items()
    }


def stream(
    params: dict[str, np.ndarray],
    config: ModelConfig,
    out: Path,
    tokens: Any = TOKENS,
    **given: Any,
) -> Result:
    return write_gradients(MemorySource(params, config), Request(tokens, **given), out)


def read(out: Path) -> dict[str, np.ndarray]:
    """Every tensor that the index names, from the file, of the shape and dtype that it names, by
    safetensors itself."""
    index = json.loads((out / "index.json").read_text())["tensors"]
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert {name: entry["file"] for name, entry in index.items()} == {
        n: f for f, x in files.items() for n in x
    }
    found = {name: files[entry["file"]][name] for name, entry in index.items()}
    assert all(
        [list(x.shape), str(x.dtype)] == [index[n]["shape"], index[n]["dtype"]]
        for n, x in found.items()
    )
    return found


def split(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model's gradients under a checkpoint's names, the experts one by one."""
    found = {}
    for name, x in gradients.items():
        if ".experts." in name:
            found |= {name.replace(".experts.", f".experts.{e}."): part for e, part in enumerate(x)}
        else:
            found[name] = x
    return found


def expect_equal(
    out: Path, output: ModelOutput, params: dict[str, np.ndarray], gradients: dict[str, Any]
) -> None:
    """Gradients, logits, loss and routes of the model, bit for bit."""
    found, wanted = read(out), split(gradients)
    assert {name.removeprefix("grad/") for name in found if name.startswith("grad/")} == set(wanted)
    wrong = [name for name, x in wanted.items() if not np.array_equal(found[f"grad/{name}"], x)]
    assert not wrong
    assert np.array_equal(found["out/logits"], logits(params, output.hidden))
    assert {n for n in found if "routes" in n} == {f"aux/routes.{layer}" for layer in output.routes}
    for layer, route in output.routes.items():
        assert np.array_equal(found[f"aux/routes.{layer}"], route.indices)
        assert np.array_equal(found[f"aux/load.{layer}"], output.loads[layer])
    if output.loss is not None:
        assert found["out/loss"] == output.loss
        assert found["out/main"] == output.main


UNTIED = replace(TINY, conventions=Conventions(mtp_hidden="raw_first", balance_counts="routed"))
CONFIGS = {
    "tiny": TINY,
    "tied": replace(TINY, tied=True),
    "variant": model_variant(TINY, Conventions()),
    "variant, normed": model_variant(TINY, Conventions(), "normed"),
    "raw first": UNTIED,
    "no dense layer, no group": replace(TINY, dense_layers=0, groups=1, keep_groups=1),
    "dense alone": replace(TINY, dense_layers=3, mtp_depth=0),
    "three modules": replace(TINY, layers=2, mtp_depth=3),
    "larger than a block": replace(TINY, vocabulary=2 * ROWS + 5, mtp_depth=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_loss(name: str, tmp_path: Path) -> None:
    """With MTP and balance: the model's loss and gradients, bit for bit."""
    config = CONFIGS[name]
    params = parameters(config)
    tokens = RNG.integers(0, config.vocabulary, (2, 12))
    output, saved = forward(params, tokens, config)
    result = stream(
        params,
        config,
        tmp_path / "out",
        tokens,
        mtp=config.mtp_depth > 0,
        balance_alpha=config.balance_weight,
    )
    gradients = backward(saved)
    expect_equal(tmp_path / "out", output, params, gradients)
    assert [result.loss, result.main, result.mtp] == [output.loss, output.main, output.mtp]
    assert result.balance == output.balance
    assert not (tmp_path / "out" / "unfinished").exists()
    for name, x in split(gradients).items():
        size = result.gradients[name]
        assert (size.elements, size.largest) == (x.size, np.abs(x).max())
        np.testing.assert_allclose(size.norm, np.linalg.norm(x), rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_default_loss(implementation: str, dtype: Any, tmp_path: Path) -> None:
    """What Hugging Face computes: no MTP, no balance loss, whatever the config says."""
    config, params = replace(TINY, mtp_depth=0, balance_weight=0.0), parameters(TINY, dtype)
    plain = {name: params[name] for name in parameter_shapes(config)}
    output, saved = forward(plain, TOKENS, config, ops=IMPLEMENTATIONS[implementation])
    stream(params, TINY, tmp_path / "out", implementation=implementation)
    expect_equal(tmp_path / "out", output, plain, backward(saved))
    found = read(tmp_path / "out")
    z = found["out/logits"].astype(np.float64)
    log_p = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    each = -np.take_along_axis(log_p[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(
        found["out/loss_per_token"][:, :-1], each, rtol=0, atol=50 * np.finfo(dtype).eps
    )
    assert not found["out/loss_per_token"][:, -1].any()
    np.testing.assert_allclose(found["out/loss"], each.mean(), rtol=20 * np.finfo(dtype).eps)
    assert {x.dtype for n, x in found.items() if n[:4] in ("grad", "out/")} == {np.dtype(dtype)}


def test_masks_and_targets(tmp_path: Path) -> None:
    """Loss mask, padding and own targets go where the model puts them."""
    config, params = TINY, parameters(TINY)
    given = {
        "mask": RNG.random(TOKENS.shape) < 0.7,
        "key_mask": np.arange(12) < np.array([[12], [9]]),
        "targets": RNG.integers(0, 256, TOKENS.shape),
    }
    for number, names in enumerate(
        (["mask"], ["key_mask"], ["mask", "key_mask"], ["targets"], list(given))
    ):
        chosen: Any = {name: given[name] for name in names}
        output, saved = forward(params, TOKENS, config, **chosen)
        stream(
            params,
            config,
            tmp_path / str(number),
            mtp=True,
            balance_alpha=config.balance_weight,
            **chosen,
        )
        expect_equal(tmp_path / str(number), output, params, backward(saved))
        found = read(tmp_path / str(number))
        np.testing.assert_allclose(
            found["out/loss_per_token"].sum() / found["in/mask"].sum(), output.main, rtol=1e-14
        )


@pytest.mark.parametrize("tied", [False, True])
def test_from_dlogits(tied: bool, tmp_path: Path) -> None:
    """The backward alone: of any loss, from its gradient by the logits."""
    config = replace(TINY, tied=tied, mtp_depth=0)
    params, dlogits = parameters(config), RNG.normal(size=(*TOKENS.shape, 256))
    output, saved = forward(params, TOKENS, config, with_loss=False)
    result = stream(params, config, tmp_path / "out", dlogits=dlogits)
    expect_equal(tmp_path / "out", output, params, backward(saved, dlogits=dlogits))
    assert result.loss is None
    assert not (tmp_path / "out" / "out.safetensors").exists()


@pytest.mark.parametrize("counts", ["unbiased", "routed"])
def test_replayed_routes(counts: str, tmp_path: Path) -> None:
    """Other routes than the model's own are followed, in forward and backward, MTP's too; what
    counts as well."""
    config = replace(TINY, conventions=Conventions(balance_counts=counts))
    params = parameters(config)
    own, _ = forward(params, TOKENS, config)
    other = {
        layer: np.argsort(RNG.random((*r.indices.shape[:2], 8)))[..., :3]
        for layer, r in own.routes.items()
    }
    for name, routes in {
        "with counts": {layer: Route(x, RNG.permutation(x)) for layer, x in other.items()},
        "without": {layer: Route(x, None) for layer, x in other.items()},
    }.items():
        full = routes
        if name == "without":  # the balance loss then counts what the convention says
            full = {
                layer: Route(x, x if counts == "routed" else None) for layer, x in other.items()
            }
        output, saved = forward(params, TOKENS, config, routes=full)
        assert output.loss != own.loss
        stream(
            params,
            config,
            tmp_path / name,
            mtp=True,
            balance_alpha=config.balance_weight,
            routes=routes,
        )
        expect_equal(tmp_path / name, output, params, backward(saved))


def test_the_backward_replays_the_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where recomputation would choose other experts, the routes of the first forward hold."""
    params, seen = parameters(TINY), []
    op = IMPLEMENTATIONS["reference"]["router"]

    def noted(*args: Any, routes: Any = None, **kwargs: Any) -> Any:
        seen.append(routes is not None)
        return op.forward(*args, routes=routes, **kwargs)

    noting = IMPLEMENTATIONS["reference"] | {"router": op._replace(forward=noted)}
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", noting)
    stream(params, TINY, tmp_path / "out", mtp=True)
    assert seen == [False] * 4 + [True] * 4


@pytest.mark.parametrize("layers", [1, 2])
def test_some_layers(layers: int, tmp_path: Path) -> None:
    """The first layers, then final norm and head: the model that a config of so many layers has."""
    whole = replace(TINY, dense_layers=2)
    config = replace(whole, layers=layers, dense_layers=layers, mtp_depth=0, balance_weight=0.0)
    params = parameters(whole)
    fewer = {name: params[name] for name in parameter_shapes(config)}
    output, saved = forward(fewer, TOKENS, config)
    stream(params, whole, tmp_path / "out", layers=layers)
    expect_equal(tmp_path / "out", output, fewer, backward(saved))


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("model.layers.2.*", 7),
        ("*.experts.5.up_proj.weight", 8),
        ("lm_head.weight", 5),
        ("model.embed*", 10),
    ],
)
def test_only(pattern: str, steps: int, tmp_path: Path) -> None:
    """Some gradients, the same bits; the backward goes no further down than it must."""
    config, params, done = replace(TINY, mtp_depth=0), parameters(replace(TINY, mtp_depth=0)), []
    stream(params, config, tmp_path / "all")
    request = Request(TOKENS, only=pattern)
    write_gradients(
        MemorySource(params, config),
        request,
        tmp_path / "some",
        progress=lambda step, number, total: done.append((step, total)),
    )
    every, some = read(tmp_path / "all"), read(tmp_path / "some")
    wanted = {f"grad/{n}" for n in gradient_shapes(config) if Path(n).match(pattern)}
    assert {n for n in some if n.startswith("grad/")} == wanted
    assert all(np.array_equal(every[name], x) for name, x in some.items())
    assert done[-1] == ("done", steps)


def test_activations(tmp_path: Path) -> None:
    """Each is what its name says, by way of the model's saved values."""
    config, params = TINY, parameters(TINY)
    output, saved = forward(params, TOKENS, config)
    result = stream(params, config, tmp_path / "out", mtp=True, activations="*", logits=False)
    found = {name[4:]: x for name, x in read(tmp_path / "out").items() if name.startswith("act/")}
    assert set(result.activations) == set(found)
    assert "out/logits" not in read(tmp_path / "out")
    blocks = [*saved.blocks, *(module.block for module in saved.mtp)]
    assert np.array_equal(found["model.embed_tokens"], blocks[0].attention.norm.x)
    assert np.array_equal(found["model.norm"], output.hidden)
    for layer, block in enumerate(blocks):
        name = f"model.layers.{layer}"
        assert np.array_equal(found[f"{name}.after_attention"], block.network.norm.x)
        attended = found[f"{name}.self_attn"]
        assert np.array_equal(block.attention.norm.x + attended, block.network.norm.x)
        if layer:
            assert np.array_equal(found[f"{name}.mlp.gate.scores"], block.network.router.scores)
    inputs = [block.attention.norm.x for block in blocks[1:3]] + [saved.norm.x]
    outputs = inputs + [module.norm.x for module in saved.mtp]
    assert all(np.array_equal(found[f"model.layers.{layer}"], x) for layer, x in enumerate(outputs))
    stream(params, config, tmp_path / "some", activations="*.gate.scores")
    assert sorted(n for n in read(tmp_path / "some") if n.startswith("act/")) == [
        "act/model.layers.1.mlp.gate.scores",
        "act/model.layers.2.mlp.gate.scores",
    ]


def test_cotangents(tmp_path: Path) -> None:
    """Each makes the gradients of what its activation is made of: the table's rows, the norm's
    weight, and the weights of the last product that joins a layer's output."""
    config = replace(TINY, mtp_depth=0, balance_weight=0.0)
    params = parameters(config)
    stream(params, config, tmp_path / "out", activations="*")
    found = read(tmp_path / "out")
    cot = {name[4:]: x for name, x in found.items() if name.startswith("cot/")}
    assert set(cot) == {
        "model.embed_tokens",
        "model.norm",
        *(f"model.layers.{n}" for n in range(config.layers)),
    }
    table = np.zeros_like(params["model.embed_tokens.weight"])
    np.add.at(table, TOKENS, cot["model.embed_tokens"])
    np.testing.assert_allclose(table, found["grad/model.embed_tokens.weight"], rtol=0, atol=1e-15)
    scaled = (
        np.sum(cot["model.norm"] * found["act/model.norm"], axis=(0, 1))
        / params["model.norm.weight"]
    )
    np.testing.assert_allclose(scaled, found["grad/model.norm.weight"], rtol=1e-12, atol=1e-14)
    _, saved = forward(params, TOKENS, config)
    for layer in range(config.layers):
        last = (
            saved.blocks[layer].network.ffn
            if layer < config.dense_layers
            else saved.blocks[layer].network.moe.shared
        )
        name = f"model.layers.{layer}.mlp" + (
            "" if layer < config.dense_layers else ".shared_experts"
        )
        hidden = last.down.x.reshape(
            -1, last.down.x.shape[-1]
        )  # what down_proj, whose output joins the layer's, reads
        dy = cot[f"model.layers.{layer}"].reshape(-1, config.width)
        np.testing.assert_allclose(
            dy.T @ hidden, found[f"grad/{name}.down_proj.weight"], rtol=0, atol=1e-15
        )


def test_no_stack_of_experts_is_read(tmp_path: Path) -> None:
    """Experts come one by one, of the embedding only the rows that occur, and in the backward each
    expert once."""
    config, params = replace(TINY, mtp_depth=0), parameters(replace(TINY, mtp_depth=0))
    asked: list[tuple[str, Any]] = []

    class Watched(MemorySource):
        def tensor(self, name: str) -> np.ndarray:
            asked.append((name, None))
            return super().tensor(name)

        def piece(self, name: str, index: Any) -> np.ndarray:
            asked.append((name, index))
            return super().piece(name, index)

    write_gradients(Watched(params, config), Request(TOKENS), tmp_path / "out")
    stacks = [(name, index) for name, index in asked if ".experts." in name]
    assert all(isinstance(index, int) for _, index in stacks)
    assert max(stacks.count(entry) for entry in stacks) == 2
    rows = [index for name, index in asked if name == "model.embed_tokens.weight"]
    assert len(rows) == 1
    assert np.array_equal(rows[0], np.unique(TOKENS))


def test_rows_are_summed_in_order() -> None:
    """Blocks of a sum of lookups and of whole tables are the rows of the whole sum."""
    ids, values = RNG.integers(0, 2 * ROWS + 3, 50), RNG.normal(size=(50, 4))
    table = RNG.normal(size=(2 * ROWS + 3, 4))
    whole = table.copy()
    np.add.at(whole, ids, values)
    found = np.concatenate(
        [block for _, block in sum_in_blocks([table, Rows(ids, values)], len(table))]
    )
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-14)


# Killed and resumed

CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
from test_streaming import TINY, TOKENS, parameters
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
request = Request(TOKENS, mtp=True, balance_alpha=0.01, activations="*")
write_gradients(MemorySource(parameters(TINY), TINY), request, Path({out!r}))
"""


def run_child(out: Path, writes: int) -> int:
    """The whole loss of tiny in a process of its own, killed when it would write one tensor more
    than ``writes``."""
    code = CHILD.format(tests=str(Path(__file__).parent), writes=writes, out=str(out))
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


def test_killed_and_resumed(tmp_path: Path) -> None:
    """Killed over and over in the middle of a file, each time as soon; what is done stays, and all
    is as of one run."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    stream(parameters(TINY), TINY, whole, mtp=True, balance_alpha=0.01, activations="*")
    done: dict[Path, int] = {}
    for writes in (0, 5, 50, 50, 50, 50, 50):
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
        stream(parameters(TINY), TINY, out, balance_alpha=0.01, activations="*")
    assert run_child(out, 10**9) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_at_every_step(tied: bool, tmp_path: Path) -> None:
    """Interrupted at the beginning of every step in turn, what is left is as of one run."""
    config = replace(TINY, tied=tied)
    source = MemorySource(parameters(config), config)
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
    params, config = parameters(TINY), TINY
    mask = np.ones_like(TOKENS, dtype=bool)
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


def unfinished(out: Path) -> Callable[..., Result]:
    """Leave a run that stopped when its first backward was done; the function resumes it."""
    source, request = MemorySource(parameters(TINY), TINY), Request(TOKENS, activations="*")

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
        CouldNotRun, match=r"unfinished/request.json is broken: start anew with --force$"
    ):
        resume()
    resume(force=True)
    assert (tmp_path / "index.json").exists()


@pytest.mark.parametrize("file", ["act-layer-00001", "cot-norm", "grad-layer-00002", "logits"])
def test_a_file_of_a_finished_step(file: str, tmp_path: Path) -> None:
    """Gone or cut off, it can't be made again by going on: no index names it."""
    resume = unfinished(tmp_path)
    path = tmp_path / f"{file}.safetensors"
    data = path.read_bytes()
    for change in (lambda: path.write_bytes(data[:-1]), path.unlink):
        change()
        with pytest.raises(
            CouldNotRun, match=rf"{path.name} is gone or changed since .*: start anew with --force$"
        ):
            resume()
        assert not (tmp_path / "index.json").exists()
    path.write_bytes(data)
    resume()
    assert f"{file}.safetensors" in {entry.name for entry in tmp_path.iterdir()}
    assert read(tmp_path)


def test_a_record_without_notes(tmp_path: Path) -> None:
    """As another program or an older version leaves it."""
    resume = unfinished(tmp_path)
    write_tensor_file(
        tmp_path / "unfinished" / "head.safetensors", tmp_path / "new", {"x": np.zeros(3)}
    )
    with pytest.raises(CouldNotRun, match=r"head.safetensors is broken: start anew with --force$"):
        resume()
    write_tensor_file(
        tmp_path / "unfinished" / "head.safetensors",
        tmp_path / "new",
        {"x": np.zeros(3)},
        {"notes": '{"files": {}}'},
    )
    with pytest.raises(
        CouldNotRun, match=r"head.safetensors is not as this version writes it: start anew with"
    ):
        resume()


def test_a_finished_result_stays(tmp_path: Path) -> None:
    """Nothing is overwritten without force, nor beside foreign files even with it."""
    params = parameters(TINY)
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
    source = MemorySource(parameters(TINY), TINY)
    other = partial(write_gradients, source, Request(TOKENS, only="model.norm.*"), out)

    def meanwhile(step: str, done: int, total: int) -> None:
        if done < total:
            with pytest.raises(CouldNotRun) as error:
                other(force=force)
            refused.append(str(error.value))

    write_gradients(source, Request(TOKENS), out, progress=meanwhile)
    assert set(refused) == {f"{out} is in use by another run"}
    stream(parameters(TINY), TINY, tmp_path / "alone")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()
    }
    other(force=True)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Another process's folder can't be used while it lives, and can once it was killed."""
    code = "import sys, time; from pathlib import Path; from refimpl.grads.folder import held\n"
    code += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(CouldNotRun, match="is in use by another run"):
            stream(parameters(TINY), TINY, tmp_path)
        child.kill()
    stream(parameters(TINY), TINY, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "out.safetensors"


# Files


def test_tensor_files(tmp_path: Path) -> None:
    """Written in any order and piece by piece, safetensors reads it; what is missing is an error
    and leaves nothing."""
    path, beside = tmp_path / "x.safetensors", tmp_path / "beside"
    a, b = RNG.normal(size=(5, 3)), RNG.integers(0, 9, (4,))
    specs = {
        "b": Spec(b.shape, b.dtype),
        "a": Spec(a.shape, a.dtype),
        "zero": Spec((2, 2), np.dtype("float32")),
    }
    with TensorWriter(path, beside, specs, {"notes": "n"}) as writer:
        writer.write("a", a[3:], 9)
        writer.zero("zero")
        writer.write("b", b)
        writer.write("a", np.asfortranarray(a[:3]))
        assert not path.exists()
    assert not beside.exists()
    found, wanted = load_file(path), {"a": a, "b": b, "zero": np.zeros((2, 2), np.float32)}
    ours, metadata = read_tensor_file(path)
    assert metadata == {"notes": "n"}
    for name, x in wanted.items():
        assert np.array_equal(found[name], x)
        assert np.array_equal(ours[name], x)
        assert found[name].dtype == ours[name].dtype == x.dtype
    with (
        pytest.raises(RuntimeError, match=r"y.safetensors lacks values of a"),
        TensorWriter(tmp_path / "y.safetensors", beside, {"a": specs["a"]}) as writer,
    ):
        writer.write("a", a[1:])
    with (
        pytest.raises(ValueError, match="a must be Spec"),
        TensorWriter(path, beside, {"a": specs["a"]}) as writer,
    ):
        writer.write("a", a.astype(np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]
    data = path.read_bytes()
    for broken in (
        b"",
        data[:5],
        data[:40],
        data[:-1],
        data + b"x",
        b"\xff" * 100,
        data.replace(b'"shape"', b'"shave"'),
    ):
        path.write_bytes(broken)
        with pytest.raises(
            CouldNotRun, match=r"x.safetensors is (cut off or )?no safetensors file"
        ):
            read_tensor_file(path)
    write_tensor_file(path, beside, {"empty": np.zeros((0, 3)), "scalar": np.array(2.5)})
    assert read_tensor_file(path)[0]["scalar"] == 2.5


# Memory


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured on Linux")
def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """8 layers need what 2 need, within 10 %, and a small part of what all gradients take."""
    from refimpl.checkpoint import write_random

    config = replace(
        preset("v2-lite"),
        vocabulary=500,
        width=1024,
        layers=8,
        heads=4,
        dense_hidden=2048,
        kv_latent=128,
        experts=8,
        expert_hidden=512,
        top_k=2,
    )
    write_random(config, tmp_path / "checkpoint")
    start = grads_memory(
        tmp_path / "checkpoint", tmp_path / "none", "--layers", "1", "--only", "lm_head.*", tokens=2
    )
    two = grads_memory(tmp_path / "checkpoint", tmp_path / "two", "--layers", "2", tokens=64)
    eight = grads_memory(tmp_path / "checkpoint", tmp_path / "eight", tokens=64)
    assert eight.numbers > 3 * two.numbers
    assert eight.peak <= 1.1 * two.peak
    assert eight.peak - start.peak < eight.numbers * 4 / 4
