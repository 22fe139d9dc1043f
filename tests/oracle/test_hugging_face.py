"""Our model against Hugging Face's, on tiny random checkpoints that theirs saved: logits, loss and
every gradient.

Needs torch and transformers (make oracle); skipped without. tests/golden/test_checkpoints.py
compares with values kept from such runs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.config import CONVENTIONS, preset
from refimpl.files import read_json
from refimpl.model import forward as our_forward
from refimpl.ops import bias_update
from refimpl.parameters import init_parameters, is_buffer

from golden.checkpoint_values import (
    GOLDEN,
    LOGITS,
    Values,
    assert_agree,
    errors,
    golden_values,
    our_values,
    read_checkpoint,
    relative_error,
)
from support import FULL

WHY = "the oracle needs torch and transformers: make oracle"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

from torch.nn.functional import cross_entropy, one_hot
from transformers.modeling_layers import MtpModel

from golden.make_checkpoints import MODELS, make
from oracle.hugging_face import (
    NarrowNumbers,
    Routing,
    build,
    build_mtp,
    float64,
    load,
    our_names,
    their_values,
)

CONFIGS = 300 if FULL else 40  # drawn for each family
SMALLEST_GAP = (
    1e-6  # a choice decided by less could go the other way in another implementation's rounding
)

SMALL: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 10,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 7,
    "q_lora_rank": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "qk_nope_head_dim": 6,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
    },
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 10))


@st.composite
def configurations(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """What a config.json of the family can say, at small sizes."""
    integer, choice = (
        (lambda low, high: draw(st.integers(low, high))),
        (lambda *options: draw(st.sampled_from(options))),
    )
    layers = integer(1, 3)
    heads = integer(1, 4)
    groups = integer(1, 4)
    mean = choice(2, 3)
    keep = integer(1, groups)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": choice(100.0, 1e4, 5e4)}
    longest = 4096
    if draw(st.booleans()):
        original = choice(1, 16, 64, 4096)
        scales = choice(
            {},
            {"mscale": 1.0, "mscale_all_dim": 1.0},
            {"mscale": 0.707, "mscale_all_dim": 0.707},
            {"mscale": 0.7, "mscale_all_dim": 0.9},
            {"mscale": 0.7},
            {"mscale": 0.7, "mscale_all_dim": 0.0},
        )
        rope |= {
            "rope_type": "yarn",
            "factor": choice(1.0, 2.5, 40.0),
            "original_max_position_embeddings": original,
            "beta_fast": choice(32.0, 4.0),
            "beta_slow": choice(1.0, 0.5),
            **scales,
        }
        longest = choice(original, int(original * rope["factor"]))
    config: dict[str, Any] = {
        "vocab_size": integer(11, 40),
        "hidden_size": heads * integer(2, 6),
        "intermediate_size": integer(3, 12),
        "moe_intermediate_size": integer(2, 8),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_shared_experts": integer(0, 2),
        "n_routed_experts": groups * mean,
        "kv_lora_rank": integer(2, 9),
        "q_lora_rank": choice(None, 3, 6),
        "qk_rope_head_dim": choice(2, 4, 8, 16),
        "v_head_dim": integer(1, 6),
        "qk_nope_head_dim": integer(1, 6),
        "n_group": groups,
        "topk_group": keep,
        "num_experts_per_tok": integer(1, keep * mean),
        "first_k_dense_replace": integer(0, layers),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": choice(1.0, 2.5, 16.0),
        "rms_norm_eps": choice(1e-6, 1e-5, 1e-3),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": longest,
        "rope_parameters": rope,
        "pad_token_id": None,
    }
    if family == "v3":
        return config | {"rope_interleave": draw(st.booleans())}
    return config | {"topk_method": choice("greedy", "group_limited_greedy")}


def draw_inputs(
    data: st.DataObject, rng: np.random.Generator, vocabulary: int
) -> tuple[np.ndarray, ...]:
    """Tokens, labels as transformers wants them, attention mask or None, positions or None, and our
    arguments."""
    batch, time = data.draw(st.integers(2, 3)), data.draw(st.integers(8, 14))
    tokens = rng.integers(0, vocabulary, (batch, time))
    kind = data.draw(st.sampled_from(["whole", "right", "left", "packed", "masked"]))
    labels = tokens.copy()
    ours = {}
    padding = None
    positions = None
    lengths = rng.integers(3, time + 1, (batch, 1))
    if kind == "right":  # everything else by default
        padding = np.arange(time) < lengths
        ours = {"key_mask": padding}
    elif kind == "left":
        padding = np.arange(time) >= time - lengths
        positions = np.maximum(np.cumsum(padding, axis=1) - 1, 0)
        ours = {"key_mask": padding, "positions": positions}
    elif kind == "packed":  # transformers finds the documents by their positions
        segments = (np.arange(time) >= lengths).astype(int)
        positions = np.where(segments, np.arange(time) - lengths, np.arange(time))
        ours = {"segments": segments, "positions": positions}
        labels[:, 1:][segments[:, 1:] != segments[:, :-1]] = -100
    elif kind == "masked":  # targets of their own, some left out
        labels = np.where(
            rng.random(tokens.shape) < 0.7, rng.integers(0, vocabulary, tokens.shape), -100
        )
        labels[0, 1] = 3
        targets = np.append(labels[:, 1:], np.full((batch, 1), -100), axis=1)
        ours = {"targets": targets, "mask": targets >= 0}
    if padding is not None:
        labels[~padding] = -100
    return tokens, labels, padding, positions, ours  # type: ignore[return-value]


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_drawn_configurations(family: str) -> None:
    """Logits and loss to 1e-12, every gradient to 1e-11, over drawn configurations, masks and
    implementations."""
    worst = [0.0, 0.0]
    count = 0
    hit = set()

    @settings(max_examples=CONFIGS)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal count
        config = data.draw(configurations(family))
        seed = data.draw(st.integers(0, 2**32 - 1))
        tokens, labels, padding, positions, inputs = draw_inputs(
            data, np.random.default_rng(seed), config["vocab_size"]
        )
        attention, experts = (
            data.draw(st.sampled_from(["eager", "sdpa"])),
            data.draw(st.sampled_from(["eager", "batched_mm"])),
        )
        with TemporaryDirectory() as folder, float64():
            model = build(family, config, seed, Path(folder), attention=attention, experts=experts)
            routing = Routing(model)
            theirs = their_values(
                model, tokens, labels, attention_mask=padding, position_ids=positions
            )
            ours_config, params = read_checkpoint(Path(folder))
        assume(routing.margin() > SMALLEST_GAP)
        if attention == "sdpa":  # which gives queries that see no key 0, not the mean
            sdpa = replace(ours_config.conventions, blind_query="zero")
            ours_config = replace(ours_config, conventions=sdpa)
        ours = our_values(params, tokens, ours_config, **inputs)
        found = assert_agree(ours, theirs, padding)
        worst[:] = [max(pair) for pair in zip(worst, found, strict=True)]
        count += 1
        hit.update(
            f"{name}={value}"
            for name, value in config.items()
            if name
            in (
                "q_lora_rank",
                "tie_word_embeddings",
                "n_shared_experts",
                "topk_method",
                "rope_interleave",
            )
        )
        biases = [p for n, p in params.items() if is_buffer(n)]
        hit.update(inputs, [config["rope_parameters"]["rope_type"]])
        hit.update({"negative bias"} if any((b < 0).any() for b in biases) else ())

    run()
    print(
        f"{family}: {count} configurations, logits within {worst[0]:.1e}, gradients within "
        f"{worst[1]:.1e}"
    )
    assert count >= CONFIGS
    assert {
        "q_lora_rank=None",
        "tie_word_embeddings=True",
        "tie_word_embeddings=False",
        "yarn",
        "default",
    } <= hit
    assert {
        "n_shared_experts=0",
        "n_shared_experts=2",
        "key_mask",
        "positions",
        "segments",
        "targets",
    } <= hit
    assert ("negative bias" in hit) == (family == "v3")


@pytest.mark.parametrize("family", ["kimi", "glm4", "v32", "dsa"])
@pytest.mark.parametrize("fused", [False, True])
def test_other_model_types(family: str, fused: bool, tmp_path: Path) -> None:
    """Kimi-K2, GLM-4.7-Flash, V3.2 and GLM-5 are V3's model under other names, the last two up to
    index_topk tokens; their experts one by one or fused, as transformers 5 may save them."""
    settings = SMALL | {"index_topk": 10, "index_head_dim": 8, "index_n_heads": 2}
    if family not in ("v32", "dsa"):
        settings = SMALL
    if family != "kimi":
        settings = settings | {"n_group": 1, "topk_group": 1}
    with float64():
        model = build("v3" if family == "kimi" else family, settings, 1, tmp_path)
        if fused:
            model.float().save_pretrained(tmp_path, save_original_format=False)
            model.double()
        theirs = their_values(model, TOKENS, TOKENS)
    if family == "kimi":  # transformers has no name of its own for it
        content = (tmp_path / "config.json").read_text().replace("deepseek_v3", "kimi_k2")
        (tmp_path / "config.json").write_text(content)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names) == fused
    config, params = read_checkpoint(tmp_path)
    grads = {name: x for name, x in theirs.grads.items() if ".indexer." not in name}
    assert_agree(our_values(params, TOKENS, config), theirs._replace(grads=grads))


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_nothing_is_left_in_float32(family: str) -> None:
    """No operation of forward or backward makes narrow numbers inside `float64`; outside, many do,
    and it shows.

    So transformers' float64 is not float64: a port that is compared with it stops at 1e-7.
    """
    with TemporaryDirectory() as folder:
        with float64():
            model = build(family, SMALL, 1, Path(folder))
            with NarrowNumbers() as narrow:
                theirs = their_values(model, TOKENS, TOKENS)
        assert narrow.seen == set()
        config, params = read_checkpoint(Path(folder))
    ours = our_values(params, TOKENS, config)
    assert_agree(ours, theirs)
    model = build(family, SMALL, 1)
    with NarrowNumbers() as narrow:
        theirs = their_values(model, TOKENS, TOKENS)
    assert {
        "aten.rsqrt.default",
        "aten._softmax.default",
        "aten._log_softmax.default",
    } <= narrow.seen
    forward_error, gradient_error, _ = errors(ours, theirs)
    print(
        f"{family} with its float32: logits within {forward_error:.1e}, gradients within "
        f"{gradient_error:.1e}"
    )
    assert 1e-9 < forward_error < 1e-5
    assert 1e-9 < gradient_error < 1e-3


def mtp_logits(state: Any, tokens: Any, modules: Any) -> list[Any]:
    """The logits of each MTP module from the main model's last hidden state, by transformers' own
    modules."""
    logits = []
    for k in range(modules.num_mtp_layers):
        positions = torch.arange(k + 1, tokens.shape[1])[None]  # of the tokens that it reads
        state = modules.forward_layer(
            k, state[:, :-1], positions, None, input_ids=tokens[:, k + 1 :], use_cache=False
        )
        logits.append(modules.shared_head(state))
    return logits


def balance_loss(logits: Any, batch: int, top_k: int, alpha: float, family: str) -> Any:
    """V3's eq. 17 to 20 from router logits [B·T, E]: α Σ_i f_i P_i of a sequence, averaged; f_i of
    unbiased scores."""
    scores = (logits.sigmoid() if family == "v3" else logits.softmax(-1)).unflatten(0, (batch, -1))
    time, experts = scores.shape[1:]
    chosen = one_hot(scores.topk(top_k)[1], experts).sum((1, 2)).double()
    f = experts / (top_k * time) * chosen
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return alpha * (f * p).sum(-1).mean()


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_training_loss(family: str) -> None:
    """MTP, balance loss and bias update: transformers' modules with the report's losses on top, to
    the same bounds."""
    worst = [0.0, 0.0]
    count = 0
    smallest_step = 0.001

    @settings(max_examples=CONFIGS // 2)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal count
        drawn, seed = data.draw(configurations(family)), data.draw(st.integers(0, 2**32 - 1))
        depth = data.draw(st.integers(0, 3)) if family == "v3" else 0
        hidden_first = data.draw(st.booleans())
        weight, alpha = (
            data.draw(st.sampled_from([0.1, 0.3])),
            data.draw(st.sampled_from([1e-3, 0.05])),
        )
        batch, time = data.draw(st.integers(2, 3)), data.draw(st.integers(8, 12))
        tokens = np.random.default_rng(seed).integers(0, drawn["vocab_size"], (batch, time))
        drawn |= (
            {"num_mtp_layers": depth, "mtp_hidden_states_first": hidden_first}
            if family == "v3"
            else {}
        )
        with TemporaryDirectory() as folder, float64():
            model = build(family, drawn, seed, Path(folder))
            config, params = read_checkpoint(Path(folder))
            modules = build_mtp(model, depth, seed + 1) if depth else None
            mains, later = Routing(model), Routing(modules or torch.nn.Module())
            ids = torch.tensor(tokens)
            state = model.model(ids, use_cache=False).last_hidden_state
            logits = [
                model.lm_head(state),
                *(mtp_logits(state, ids, modules) if modules is not None else []),
            ]
        losses = [
            cross_entropy(z[:, :-1].flatten(0, 1), ids[:, k + 1 :].flatten(), reduction="sum")
            for k, z in enumerate(logits)
        ]
        loss = losses[0] / (batch * (time - 1)) + sum(losses[1:]) * weight / max(depth, 1) / (
            batch * time
        )
        for routing in (mains, later):
            for router_logits in routing.logits.values():
                loss = loss + balance_loss(router_logits, batch, config.top_k, alpha, family)
        loss.backward()
        assume(min(mains.margin(), later.margin()) > SMALLEST_GAP)

        order = "hidden_embedding" if hidden_first else "embedding_hidden"
        config = replace(
            config,
            mtp_depth=depth,
            mtp_weight=weight,
            balance_weight=alpha,
            conventions=replace(config.conventions, mtp_order=order),
        )
        everything = dict(model.named_parameters()) | dict(model.named_buffers())
        names = {name: name for name in everything}
        if modules is not None:
            own = {
                n: t
                for n, t in [*modules.named_parameters(), *modules.named_buffers()]
                if n.startswith("layers.")
            }
            names |= {n: mtp_name(n, config.layers) for n in own}
            everything |= own
        hidden = drawn["moe_intermediate_size"]
        params = our_names(
            {names[n]: t for n, t in everything.items() if "inv_freq" not in n}, hidden
        )
        grads = our_names(
            {
                names[n]: torch.zeros_like(t) if t.grad is None else t.grad
                for n, t in everything.items()
                if isinstance(t, torch.nn.Parameter)
            },
            hidden,
        )
        output, _ = our_forward(params, tokens, config)
        ours = our_values(params, tokens, config)
        found = assert_agree(ours, Values(logits[0].detach().numpy(), loss.item(), grads))
        worst[:] = [max(pair) for pair in zip(worst, found, strict=True)]
        for layer, (gate, indices) in enumerate([*mains.indices.items(), *later.indices.items()]):
            load = torch.bincount(indices.flatten(), minlength=config.experts).double()
            moe_layer = config.dense_layers + layer
            np.testing.assert_array_equal(output.loads[moe_layer], load.numpy())
            bias = params.get(f"model.layers.{moe_layer}.mlp.gate.e_score_correction_bias")
            if bias is not None:
                moved = torch.tensor(bias) + smallest_step * torch.sign(load.mean() - load)
                np.testing.assert_array_equal(
                    bias_update(bias, output.loads[moe_layer], smallest_step),
                    moved.numpy(),
                    err_msg=gate,
                )
        count += 1

    run()
    print(f"{family}: {count} losses, within {worst[0]:.1e}, gradients within {worst[1]:.1e}")
    assert count >= CONFIGS // 2


def mtp_name(name: str, layers: int) -> str:
    """A parameter of `MtpModel` under the checkpoint's name."""
    _, module, rest = name.split(".", 2)
    rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
    return f"model.layers.{layers + int(module)}.{rest}"


@pytest.mark.parametrize("name", MODELS)
def test_golden_checkpoints_are_what_the_script_makes(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    file = "model.safetensors"
    assert (tmp_path / file).read_bytes() == (GOLDEN / name / file).read_bytes()
    kept, made = (read_json(folder / "config.json") for folder in (GOLDEN / name, tmp_path))
    assert kept.pop("transformers_version") in ("5.23.0", made.pop("transformers_version"))
    assert made == kept
    (_, kept), (_, made) = golden_values(GOLDEN / name), golden_values(tmp_path)
    assert_agree(kept, made)


ROUND_TRIPS: list[tuple[str, dict[str, Any]]] = [
    ("v3", SMALL),
    ("v3", SMALL | {"q_lora_rank": None, "rope_interleave": False, "tie_word_embeddings": True}),
    (
        "v3",
        SMALL
        | {
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        },
    ),
    ("v2", SMALL | {"topk_method": "group_limited_greedy", "kv_lora_rank": 8}),
    (
        "v2",
        SMALL
        | {"topk_method": "greedy", "q_lora_rank": None, "kv_lora_rank": 8, "norm_topk_prob": True},
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "config"), ROUND_TRIPS)
def test_round_trip(family: str, config: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """transformers saves, we load and save, transformers loads: the same logits bit for bit."""
    model = build(family, config, 5).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = Checkpoint.open(tmp_path / "theirs", conventions=CONVENTIONS["hf"], mtp=False)
    save_checkpoint(
        checkpoint.load(), checkpoint.config, tmp_path / "ours", dtype=dtype, shard_bytes=15_000
    )
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    before, after = (load(family, tmp_path / name, dtype) for name in ("theirs", "ours"))
    for (name, a), (_, b) in zip(
        before.state_dict().items(), after.state_dict().items(), strict=True
    ):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    with torch.no_grad():
        logits = [m(torch.tensor(TOKENS), use_cache=False).logits for m in (before, after)]
    assert logits[0].dtype == getattr(torch, dtype)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], torch.zeros_like(logits[0]))


def test_transformers_reads_our_mtp_layer(tmp_path: Path) -> None:
    """It looks for one at layer 61 alone, so the model has 61 layers. Its draft is the one of our
    module."""
    config = replace(
        preset("tiny"),
        vocabulary=19,
        width=6,
        layers=61,
        dense_layers=3,
        heads=1,
        q_latent=3,
        dense_hidden=5,
        expert_hidden=2,
        mtp_depth=1,
        conventions=CONVENTIONS["hf"],
        norm_eps=1e-6,
    )
    save_checkpoint(
        init_parameters(config, std=0.3, seed=3), config, tmp_path / "ours", dtype="float32"
    )
    params = Checkpoint.open(
        tmp_path / "ours", dtype="float64", conventions=CONVENTIONS["hf"]
    ).load()
    tokens = np.random.default_rng(0).integers(0, 19, (2, 9))
    with float64():
        model = load("v3", tmp_path / "ours", "float32")
        modules = MtpModel.from_pretrained(model)
        model.double()
        modules.double()
        state = model.model(torch.tensor(tokens), use_cache=False).last_hidden_state
        (draft,) = mtp_logits(state, torch.tensor(tokens), modules)
    names = {n: mtp_name(n, config.layers) for n in modules.state_dict() if n.startswith("layers.")}
    theirs = our_names(
        {ours: modules.state_dict()[n] for n, ours in names.items()}, config.expert_hidden
    )
    assert theirs.keys() == {name for name in params if name.startswith("model.layers.61.")}
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, params[name], err_msg=name)
    loss = cross_entropy(
        draft[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 2:]).flatten(), reduction="sum"
    )
    ours, _ = our_forward(params, tokens, config)
    assert relative_error(ours.mtp[0], loss.item() / tokens.size) <= LOGITS
