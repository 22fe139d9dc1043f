"""What refimpl.conventions says of torchtitan: its own model, loss and hook run here, beside ours,
on a CPU.

    REFIMPL_TORCHTITAN=CHECKOUT make peers

of https://github.com/pytorch/torchtitan at b5bcd76. Ours computes float64; theirs casts to float32
and bfloat16 inside, which `wide` takes away.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from refimpl.config import CONVENTIONS, ModelConfig, preset
from refimpl.model import backward, forward, logits
from refimpl.ops import bias_update, grpo_backward, grpo_forward
from refimpl.ops.rope import Yarn, rope_frequencies
from refimpl.parameters import is_buffer

from peers.checkout import modules
from peers.rollouts import LOG_PROB, MASK, OLD
from random_parameters import random_parameters

WHY = "torchtitan's model needs the extra peers: make peers"
torch = pytest.importorskip("torch", reason=WHY)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
from torch.utils.checkpoint import checkpoint

v3, adapter, moe, rope, dispatch, mtp, loss = modules(
    "REFIMPL_TORCHTITAN",
    "torchtitan",
    "the extra peers",
    "torchtitan.models.deepseek_v3",
    "torchtitan.models.deepseek_v3.state_dict_adapter",
    "torchtitan.models.common.moe",
    "torchtitan.models.common.rope",
    "torchtitan.models.common.token_dispatcher",
    "torchtitan.models.deepseek_v3.mtp",
    "torchtitan.components.loss",
)

# a CPU has no float32 autocast: the gate's product is in its operands' type there
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")

TITAN = replace(
    CONVENTIONS["official"],
    mtp_hidden="raw_first",
    mtp_normaliser="main",
    bias_centre=True,
    gate_epsilon=1e-20,
    yarn_when="always",
)
CONFIG = replace(
    preset("tiny"),
    norm_eps=1e-5,
    balance_weight=0.0,
    max_positions=16,  # not beyond the original context: YaRN applies all the same
    yarn=Yarn(4.0, original=16, beta_fast=4.0, beta_slow=1.0, mscale=0.7, mscale_all_dim=0.7),
    conventions=TITAN,
)
TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocabulary, (1, 14))


class WideTorch:
    """``torch``, but that its float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def grouped(self: Any, *, A: Any, B_t: Any, offs: Any) -> Any:
    """The experts' products, a loop in the operands' type: torch's kernel is for bfloat16."""
    ends = [0, *offs.tolist()]
    parts = zip(ends[:-1], ends[1:], B_t, strict=True)
    return torch.cat([A[start:end] @ weight for start, end, weight in parts])


@contextmanager
def wide() -> Iterator[None]:
    """Inside, what torchtitan casts to float32 or bfloat16 is float64."""
    to64 = lambda tensor: tensor.double().contiguous()  # noqa: E731  a copy without gaps, as a cast
    with (
        mock.patch.object(torch.Tensor, "float", to64),
        mock.patch.object(torch.Tensor, "bfloat16", to64),
        mock.patch.object(dispatch, "torch", WideTorch()),
        mock.patch.object(rope, "torch", WideTorch()),
    ):
        yield


class Causal(torch.nn.Module):
    """Attention [T, H, ·] written out: flex attention's kernels compile."""

    def forward(self, q: Any, k: Any, v: Any, *, attention_masks: Any, scale: float) -> Any:
        scores = torch.einsum("thn,shn->hts", q, k) * scale
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hts,shv->thv", weights, v)


def build(c: ModelConfig) -> Any:
    """Its model of our configuration, in float64."""
    assert c.yarn is not None
    layers = v3._build_dsv3_layers(
        n_layers=c.layers,
        n_dense_layers=c.dense_layers,
        dim=c.width,
        n_heads=c.heads,
        q_lora_rank=c.q_latent or 0,
        kv_lora_rank=c.kv_latent,
        qk_nope_head_dim=c.nope,
        qk_rope_head_dim=c.rope,
        v_head_dim=c.value,
        mscale=c.yarn.mscale_all_dim,
        dense_hidden_dim=c.dense_hidden,
        moe_hidden_dim=c.expert_hidden,
        num_experts=c.experts,
        num_shared_experts=c.shared_experts,
        router_top_k=c.top_k,
        router_score_func=c.gate,
        router_num_expert_groups=c.groups,
        router_num_limited_groups=c.keep_groups,
        router_route_scale=c.routed_scale,
        router_route_norm=c.normalise_weights,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=v3.ComplexRoPE.Config(
            dim=c.rope,
            max_context_length=c.max_positions,
            theta=c.theta,
            scaling="yarn",
            rope_factor=c.yarn.factor,
            beta_fast=c.yarn.beta_fast,
            beta_slow=c.yarn.beta_slow,
            original_seq_len=c.yarn.original,
        ),
    )
    config = v3.DeepSeekV3Model.Config(
        vocab_size=c.vocabulary,
        dim=c.width,
        tok_embeddings=v3.Embedding.Config(num_embeddings=c.vocabulary, embedding_dim=c.width),
        norm=v3.RMSNorm.Config(normalized_shape=c.width),
        lm_head=v3.Linear.Config(in_features=c.width, out_features=c.vocabulary),
        layers=layers,
        mtp_layers=v3._build_mtp_layers(layers[-1], dim=c.width, num_mtp_layers=c.mtp_depth),
    )
    model = config.build().double()
    for block in [*model.layers.values(), *(model.mtp_layers or [])]:
        block.attention.inner_attention = Causal()
    return model, adapter.DeepSeekV3StateDictAdapter(config, None)


def their_name(name: str, names: Any, layers: int) -> str:
    """Where its model keeps a parameter of ours, by its own table of Hugging Face's names."""
    parts = name.split(".")
    if parts[1] != "layers":
        return str(names.from_hf_map[name])
    layer = int(parts[2])
    known = ".".join(["model.layers.{}", *parts[3:]])
    if "experts.gate_proj" in name or "experts.up_proj" in name or "experts.down_proj" in name:
        known = known.replace("mlp.experts.", "mlp.experts.{}.")
    place = names.from_hf_map[known]
    if layer >= layers:
        return str(place).replace("layers.{}", f"mtp_layers.{layer - layers}")
    return str(place).replace("{}", str(layer))


def pair(config: ModelConfig, seed: int = 0) -> tuple[Any, dict[str, np.ndarray], dict[str, str]]:
    """Its model, our parameters, which it holds too, and its names of ours."""
    params = random_parameters(config, seed)
    for name in filter(is_buffer, params):
        params[name] -= 1.0  # most biased scores are negative, so that a 0 for hidden groups shows
    model, names = build(config)
    places = {name: their_name(name, names, config.layers) for name in params}
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, place in places.items():
            state[place].copy_(torch.tensor(params[name]))
    return model, params, places


def their_run(model: Any, tokens: np.ndarray) -> tuple[Any, Any]:
    """Its logits of every depth, and its loss by `MTPLoss`, or `cross_entropy_loss` without MTP."""
    ids = torch.tensor(tokens[0])
    positions = torch.arange(len(ids))
    labels = torch.cat([ids[1:], torch.tensor([loss.IGNORE_INDEX])])
    found = model(ids, positions=positions)
    if not isinstance(found, list):
        return [found], loss.cross_entropy_loss(found, labels) / (len(ids) - 1)
    rule = mtp.MTPLoss(mtp.MTPLoss.Config(), compile_config=SimpleNamespace(enable=False))
    return found, rule(found, labels, len(ids) - 1, positions=positions)[0]


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs)) / (np.max(np.abs(theirs)) or 1.0))


def differences(config: ModelConfig, of: ModelConfig | None = None) -> tuple[float, float, float]:
    """How far ours under ``config`` is from its model of the configuration ``of``: logits, loss,
    worst gradient."""
    model, params, places = pair(of or config)
    found, value = their_run(model, TOKENS)
    value.backward()
    output, saved = forward(params, TOKENS, config)
    grads = backward(saved)
    theirs = dict(model.named_parameters())
    gradient = max(relative(x, theirs[places[name]].grad.numpy()) for name, x in grads.items())
    ours = logits(params, output.hidden)[0]
    return (
        relative(ours, found[0].detach().numpy()),
        relative(output.loss, value.item()),
        gradient,
    )


@pytest.fixture(autouse=True)
def plain_experts() -> Iterator[None]:
    with mock.patch.object(moe.GroupedExperts, "_grouped_mm", grouped):
        yield


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("queries", [10, None])
def test_the_whole_model(depth: int, queries: int | None) -> None:
    """Logits, loss and every gradient, with its choices set: rows 1 to 8, 11, 12, 20 to 24, 27 and
    28 (MTP's order, states, normaliser, tail and what its gradient reaches; groups; norms; YaRN
    within its context, and its mscale; the gate; MLA; eps of 1e-5; RoPE's layout)."""
    config = replace(CONFIG, mtp_depth=depth, q_latent=queries)
    with wide():
        found = differences(config)
    assert max(found[:2]) < 1e-13
    assert found[2] < 1e-11


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("1", {"mtp_order": "hidden_embedding"}),
    ("2", {"mtp_hidden": "normed"}),
    ("2", {"mtp_hidden": "raw"}),
    ("3", {"mtp_normaliser": "positions"}),
    ("3", {"mtp_normaliser": "valid"}),
    ("4", {"mtp_zero_first_embedding": True}),
    ("5", {"masked_groups": "zero"}),
    ("7", {"yarn_when": "beyond_original"}),
    ("21", {"latent_eps": "class_default"}),
    ("27", {"rope_layout": "halves"}),
]


@pytest.mark.parametrize(("row", "other"), OTHERS, ids=str)
def test_another_choice_shows(row: str, other: dict[str, Any]) -> None:
    with wide():
        found = differences(replace(CONFIG, conventions=replace(TITAN, **other)), CONFIG)
    assert max(found) > 1e-9


@pytest.mark.parametrize("score", ["top2", "max"])
def test_groups_without_a_bias(score: Any) -> None:
    """Row 12: the two best, bias or not; row 29: a softmax gate ranks scores."""
    config = replace(
        CONFIG, mtp_depth=0, gate="softmax", gate_bias=False, group_score=score, routed_scale=1.0
    )
    with wide():
        found = differences(config)
        ranked = differences(
            replace(config, conventions=replace(TITAN, softmax_ranking="logits")), config
        )
    assert (max(found) < 1e-11) == (score == "top2")
    assert max(ranked) > 1e-3


def test_float64_is_not() -> None:
    """Row 22: bfloat16 experts, float32 rotation and loss; the gate is float64 (row 11)."""
    logits_off, _, gradient_off = differences(CONFIG)
    print(f"unpatched float64: logits off by {logits_off:.1e}, gradients by {gradient_off:.1e}")
    assert 1e-4 < logits_off < 0.1
    assert 1e-3 < gradient_off < 1
    gate = pair(CONFIG)[0].layers["1"].moe.router
    weights, _, scores = gate(torch.randn(5, CONFIG.width, dtype=torch.float64))
    assert weights.dtype == scores.dtype == torch.float64
    hopeless = torch.full((1, CONFIG.width), -1e4, dtype=torch.float64)
    with torch.no_grad():
        gate.gate.weight.fill_(1.0)
    assert not gate(hopeless)[0].any()  # all scores underflow: 0 / 1e-20, not 0 / 0
    angles = rope.ComplexRoPE(v3.ComplexRoPE.Config(dim=64, max_context_length=32000)).cache
    assert angles.dtype == torch.complex64
    true = np.outer(np.arange(32000), rope_frequencies(64, theta=1e4))
    assert 1e-4 < np.abs(angles.real.numpy() - np.cos(true)).max() < 1e-2


def test_mscale_of_its_16b() -> None:
    """Row 8: 0.70, not 0.707."""
    config = v3._16b("flex", "standard")
    assert {layer.attention.mscale for layer in config.layers} == {0.70}


def test_the_tail() -> None:
    """Row 23: a module runs over all T positions; the tail reads token 0 with its state zeroed, and
    counts in the loads."""
    tokens = torch.tensor([5, 6, 7, 8])
    rolled, valid = mtp.roll_mtp_sequence(tokens, shift=1, fill_value=0, return_valid_mask=True)
    assert rolled.tolist() == [6, 7, 8, 0]
    assert valid.tolist() == [True, True, True, False]
    model, _, _ = pair(CONFIG)
    with wide():
        their_run(model.train(), TOKENS)
    loads = [block.moe.tokens_per_expert_E.sum().item() for block in model.mtp_layers]
    assert loads == [TOKENS.size * CONFIG.top_k] * CONFIG.mtp_depth


def update_biases(model: Any) -> None:
    """Its hook in front of an optimiser's step."""
    hooks: list[Any] = []
    v3.register_moe_load_balancing_hook(
        SimpleNamespace(register_step_pre_hook=hooks.append),
        [model],
        SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1),
    )
    hooks[0]()


def test_the_bias_update() -> None:
    """Row 10: centred; row 23: the MTP modules' gates stay."""
    model, _, _ = pair(CONFIG)
    with wide():
        their_run(model.train(), TOKENS)
    biases = {n: x for n, x in model.named_buffers() if n.endswith("expert_bias_E")}
    before = {name: x.numpy().copy() for name, x in biases.items()}
    blocks = [model.layers[str(n)] for n in range(CONFIG.dense_layers, CONFIG.layers)]
    loads = [block.moe.tokens_per_expert_E.numpy().copy() for block in blocks]
    update_biases(model)
    changes = {name: x.numpy() - before[name] for name, x in biases.items()}
    later = [change for name, change in changes.items() if name.startswith("mtp_layers")]
    assert len(later) == CONFIG.mtp_depth
    assert not np.any(later)
    main = [change for name, change in changes.items() if name.startswith("layers")]
    for change, load in zip(main, loads, strict=True):
        wanted = bias_update(np.zeros(CONFIG.experts), load, 1e-3, centre=True)
        np.testing.assert_allclose(change, wanted, atol=1e-9)


def their_step() -> tuple[Any, Any]:
    """`Trainer.train_step` and `_forward_backward_body`, from the source: the module's import needs
    all that loads data."""
    names = ("train_step", "_forward_backward_body")
    file = loss.__file__.replace("components/loss.py", "trainer.py")
    with open(file) as source:
        (trainer,) = (
            x for x in ast.parse(source.read()).body if getattr(x, "name", "") == "Trainer"
        )
    methods = [x for x in trainer.body if getattr(x, "name", "") in names]
    silent = SimpleNamespace(
        log_trace_scalar=lambda x: None, log_trace_span=lambda x: nullcontext()
    )
    known = {
        "annotations": annotations,
        "torch": torch,
        "sl": silent,
        "IGNORE_INDEX": loss.IGNORE_INDEX,
        "DTensor": (),
        "spmd": loss.spmd,
        "dist_utils": SimpleNamespace(clip_grad_norm_=lambda *a, **how: torch.zeros(())),
    }
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *methods], []), file, "exec"), known)
    return known["train_step"], known["_forward_backward_body"]


@pytest.mark.parametrize("depth", [0, 1])
def test_micro_batches(depth: int) -> None:
    """Rows 30 and 31: every sum, MTP's too, is divided by the targets of all micro-batches, so that
    the accumulated gradient is our whole batch's."""
    config = replace(CONFIG, mtp_depth=depth)
    with wide():
        model, params, places = pair(config)
    real = np.arange(TOKENS.shape[1]) < np.array([[TOKENS.shape[1]], [5]])
    tokens = np.concatenate([TOKENS, TOKENS[:, ::-1]])
    train_step, body = their_step()
    rule = (
        mtp.MTPLoss(mtp.MTPLoss.Config())
        if depth
        else loss.CrossEntropyLoss(loss.CrossEntropyLoss.Config())
    )
    nothing = SimpleNamespace(
        zero_grad=lambda **how: None,
        step=lambda: None,
        get_metrics=dict,
        should_log=lambda step: False,
        maybe_wait_for_staging=lambda: None,
    )
    trainer = SimpleNamespace(
        optimizers=nothing,
        lr_schedulers=nothing,
        metrics_processor=nothing,
        checkpointer=nothing,
        config=SimpleNamespace(training=SimpleNamespace(disable_cuda_graphs=True, max_norm=1.0)),
        parallel_dims=SimpleNamespace(
            dp_enabled=False,
            pp_enabled=False,
            ep_enabled=False,
            get_optional_mesh=lambda name: None,
        ),
        gradient_accumulation_steps=2,
        num_pp_microbatches=1,
        device=torch.device("cpu"),
        step=1,
        model_parts=[model],
        train_context=nullcontext,
        loss_fn=rule,
    )

    def forward_backward(*, input_dict: Any, labels: Any, global_valid_tokens: Any) -> Any:
        positions = torch.arange(len(labels))
        ids = input_dict["input"]
        return body(trainer, ids, labels, global_valid_tokens, {"positions": positions})

    trainer.forward_backward_step = forward_backward
    batches = []
    for row, length in zip(tokens, real.sum(axis=1), strict=True):
        ids = torch.tensor(row[:length].copy())
        labels = torch.cat([ids[1:], torch.tensor([loss.IGNORE_INDEX])])
        batches.append(({"input": ids}, labels))
    with wide():
        train_step(trainer, iter(batches))
    _, saved = forward(params, tokens, config, key_mask=real)
    theirs = dict(model.named_parameters())
    ours = backward(saved)
    assert max(relative(g, theirs[places[n]].grad.numpy()) for n, g in ours.items()) < 1e-11
    means = [
        backward(forward(params, row[None, : count.sum()], config)[1])
        for row, count in zip(tokens, real, strict=True)
    ]
    wrong = {name: (means[0][name] + means[1][name]) / 2 for name in ours}
    assert max(relative(g, theirs[places[n]].grad.numpy()) for n, g in wrong.items()) > 1e-2


def test_recomputed_forwards_count() -> None:
    """Row 10: twice, and the loads are halved then, rounded down."""
    model, _, _ = pair(replace(CONFIG, mtp_depth=0))
    block = model.train().layers[str(CONFIG.dense_layers)]
    x = torch.randn(6, CONFIG.width, dtype=torch.float64, requires_grad=True)
    with wide():
        checkpoint(block, x, None, torch.arange(6), use_reentrant=False).sum().backward()
    assert block.moe.tokens_per_expert_E.sum().item() == 2 * 6 * CONFIG.top_k
    block.checkpoint_impl = CheckpointImpl.NO_REENTRANT
    block.moe.tokens_per_expert_E.copy_(torch.tensor([3.0] + [2.0] * (CONFIG.experts - 1)))
    before = block.moe.expert_bias_E.clone()
    update_biases(model)
    assert torch.equal(block.moe.expert_bias_E, before)  # 1 each: no expert is busier


def test_grpo() -> None:
    """Rows 16, 19 and 25: DAPO with a symmetric clip of 0.2, no KL, a mean over all tokens;
    log-ratios stop at ±10, and tokens without a finite sampler's log-probability are dropped."""
    folder = mtp.__file__.rsplit("/models/", 1)[0] + "/experiments/rl"
    for name in ("torchtitan.experiments.rl", "torchtitan.experiments.rl.losses"):
        package = types.ModuleType(name)  # its own would import the engine that samples
        package.__path__ = [folder + ("/losses" if name.endswith("losses") else "")]
        sys.modules.setdefault(name, package)
    grpo = importlib.import_module("torchtitan.experiments.rl.losses.grpo")
    rule = grpo.GRPOLoss(grpo.GRPOLoss.Config())
    advantages = np.array([0.9, -0.8, 1.3, -0.5])
    per_token = np.repeat(advantages[:, None], MASK.shape[1], axis=1)

    def theirs(old: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
        other = np.log(-np.expm1(LOG_PROB.ravel()))  # two words: their log-probabilities
        leaf = torch.tensor(np.stack([LOG_PROB.ravel(), other], axis=1), requires_grad=True)
        value, _ = rule(
            leaf,
            torch.zeros(LOG_PROB.size, dtype=torch.int64),
            float((mask & np.isfinite(old)).sum()),
            generator_logprobs=torch.tensor(old.ravel()),
            advantages=torch.tensor(per_token.ravel()),
            loss_mask=torch.tensor(mask.ravel()),
        )
        value.backward()
        probability = np.exp(LOG_PROB.ravel())  # ∂ of its own logit, of a log-probability p: 1 − p
        return value.item(), (leaf.grad[:, 0].numpy() / (1 - probability)).reshape(mask.shape)

    def ours(old: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
        output, saved = grpo_forward(
            LOG_PROB,
            advantages=advantages,
            mask=mask,
            old_log_prob=old,
            average="token",
            kl_weight=0.0,
        )
        return float(output.loss), grpo_backward(1.0, saved)

    lost = OLD.copy()
    lost[0, 1] = -np.inf
    far = LOG_PROB - 12.0
    with wide():
        for old in (OLD, lost):
            a, b = theirs(old, MASK), ours(old, MASK & np.isfinite(old))
            np.testing.assert_allclose(a[0], b[0], rtol=1e-12)
            np.testing.assert_allclose(a[1], b[1], rtol=1e-11, atol=1e-15)
        stopped = theirs(np.where(MASK, far, OLD), MASK)
    bound = np.where(per_token > 0, 1.2, np.exp(10.0)) * per_token
    np.testing.assert_allclose(stopped[0], -(bound * MASK).sum() / MASK.sum(), rtol=1e-12)
    assert not stopped[1].any()
