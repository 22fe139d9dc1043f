"""`refimpl check` on code that is not ours: transformers' DeepSeek-V3 in float32 and in bfloat16,
on three checkpoints, is right; with a mistake planted in its code it is wrong in the right part, by
name. Needs the extra `oracle`."""

from __future__ import annotations

import json
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `oracle` is not installed")
pytest.importorskip("transformers", reason="the extra `oracle` is not installed")

from safetensors.torch import save_file
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from refimpl.files import read_json, write_json
from refimpl.parameters import layer_name

from golden.checkpoint_values import GOLDEN, MODEL_TYPES
from oracle.hugging_face import Routing, load
from support import refimpl_here

CHECKPOINTS = {
    "v3": GOLDEN / "v3",
    "moonlight": GOLDEN / "v3-moonlight",
    "kimi_k2": MODEL_TYPES / "kimi_k2",
}
WATCHED = r"model\.(embed_tokens|norm|layers\.\d+(\.self_attn)?)"


class Case(NamedTuple):
    """A checkpoint, tokens, and the truth of both."""

    checkpoint: Path
    tokens: Path
    truth: Path

    def run(self, out: Path, *more: object) -> Path:
        """`refimpl grads` as derivations/porting.md has it for transformers."""
        options = "--convention", "hf", "--dtype", "float64", "--activations", "*"
        arguments = "--checkpoint", self.checkpoint, "--tokens", self.tokens, "--out", out
        done = refimpl_here("grads", *arguments, *options, "--units", "float32,bfloat16", *more)
        assert done.returncode == 0, done.stderr
        return out


@pytest.fixture(scope="module", params=CHECKPOINTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = shutil.copytree(CHECKPOINTS[request.param], folder / "checkpoint")
    config = read_json(checkpoint / "config.json")
    vocabulary = config["vocab_size"]
    write_json(checkpoint / "config.json", config | {"model_type": "deepseek_v3"})
    tokens = np.random.default_rng(13).integers(0, vocabulary, (2, 24))
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    made = Case(checkpoint, folder / "tokens.json", folder / "truth")
    made.run(made.truth)
    return made


def theirs(
    case: Case, dtype: str, path: Path, change: Callable[[Any], None] = lambda model: None
) -> Path:
    """Everything that transformers' model computes, written to ``path``; ``change`` is made to the
    model before."""
    model, kept = load("v3", case.checkpoint, dtype), {}
    change(model)
    routing, tokens = Routing(model), torch.tensor(json.loads(case.tokens.read_text()))

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output
            kept[name].retain_grad()

        return hook

    for name, module in model.named_modules():
        if re.fullmatch(WATCHED, name):
            module.register_forward_hook(keep(name))
    output = model(tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    mine = {f"grad/{name}": p.grad for name, p in model.named_parameters()}
    mine |= {f"act/{name}": x for name, x in kept.items()}
    mine |= {f"cot/{name}": x.grad for name, x in kept.items()}
    mine |= {"out/logits": output.logits, "out/loss": output.loss}
    for name, indices in routing.indices.items():
        layer = int(name.split(".")[2])
        mine[f"aux/routes.{layer}"] = indices.view(*tokens.shape, -1)
        scores = routing.logits[name].sigmoid().view(*tokens.shape, -1)
        mine[f"act/{layer_name(layer, 'mlp.gate.scores')}"] = scores
    save_file({name: x.detach().contiguous() for name, x in mine.items()}, path)
    return path


def verdict(file: Path, truth: Path, dtype: str, report: Path) -> dict[str, Any]:
    done = refimpl_here("check", file, "--against", truth, "--dtype", dtype, "--json", report)
    print(done.stdout)
    assert done.returncode in (0, 1), done.stderr
    told: dict[str, Any] = read_json(report)
    return told


def test_transformers_is_right(case: Case, tmp_path: Path) -> None:
    """In float32, with the truth's routes and with its own handed over."""
    file = theirs(case, "float32", tmp_path / "theirs.safetensors")
    for truth in (case.truth, case.run(tmp_path / "again", "--routes", file)):
        told = verdict(file, truth, "float32", tmp_path / "report.json")
        assert told["verdict"] == "PASS", told["reason"]
        assert told["extra"] == []


def test_transformers_is_right_in_bfloat16(case: Case, tmp_path: Path) -> None:
    """With its routes handed over."""
    file = theirs(case, "bfloat16", tmp_path / "theirs.safetensors")
    again = case.run(tmp_path / "again", "--routes", file)
    told = verdict(file, again, "bfloat16", tmp_path / "report.json")
    assert told["verdict"] == "PASS", told["reason"]


def without_sum_over_heads(model: Any) -> None:
    """The heads but the first hand no gradient to the key that all share."""

    def expand(attention: Any, *given: Any) -> tuple[Any, Any]:
        keys, values = v3.DeepseekV3Attention.expand_kv(attention, *given)
        nope, rotated = keys.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], -1)
        rotated = torch.cat([rotated[:, :1], rotated[:, 1:].detach()], 1)
        return torch.cat([nope, rotated], -1), values

    for layer in model.model.layers:
        layer.self_attn.expand_kv = types.MethodType(expand, layer.self_attn)


def without_normalised_weights(model: Any) -> None:
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp.gate.norm_topk_prob = layer.mlp.norm_topk_prob = False


@pytest.mark.parametrize(
    ("change", "part", "bug"),
    [
        (
            without_sum_over_heads,
            "layer 2, attention, backward",
            ("mla", "gradient of k_pe from one head"),
        ),
        (
            without_normalised_weights,
            "layer 1, network, forward",
            ("router", "weights not normalised, both ways"),
        ),
    ],
)
def test_a_mistake_in_their_code(
    case: Case, change: Callable[[Any], None], part: str, bug: tuple[str, str], tmp_path: Path
) -> None:
    """In float32: the part, and the planted bug by name."""
    file = theirs(case, "float32", tmp_path / "theirs.safetensors", change)
    told = verdict(file, case.truth, "float32", tmp_path / "report.json")
    assert told["verdict"] == "FAIL"
    assert told["first_wrong"]["part"] == part
    assert [(x["op"], x["name"]) for x in told["diagnosis"]["bugs"]] == [bug]
