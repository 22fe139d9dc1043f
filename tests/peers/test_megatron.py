"""What refimpl.conventions says of Megatron-LM: pieces of it run here, beside ours, on a CPU and in
one process.

    REFIMPL_MEGATRON=CHECKOUT make peers

of https://github.com/NVIDIA/Megatron-LM at d98e8a6. Its scores, angles and losses are float32: they
agree to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from refimpl.grads.split import TermCounts, rules
from refimpl.ops import (
    balance_loss_backward,
    balance_loss_forward,
    bias_update,
    cross_entropy_backward,
    cross_entropy_forward,
    rope_forward,
    router_forward,
)
from refimpl.ops.balance_loss import count_choices
from refimpl.ops.rope import Yarn, rope_frequencies, yarn_mscale

from peers.checkout import modules

WHY = "Megatron-LM's code needs the extra peers: make peers"
torch = pytest.importorskip("torch", reason=WHY)
yarn, rope, cross_entropy, moe, router, mtp, config, schedules = modules(
    "REFIMPL_MEGATRON",
    "Megatron-LM",
    "the extra peers",
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.tensor_parallel.cross_entropy",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.transformer_config",
    "megatron.core.pipeline_parallel.schedules",
)
RNG = np.random.default_rng(11)
FLOAT32 = 5e-7  # about 8 units of 2^-24


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of this process alone."""
    store: Path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def angles(**settings: Any) -> tuple[np.ndarray, float, Any]:
    """Its YaRN angles [T, R/2] of 64 wide heads at 512 positions, its factor, and the tensor."""
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        embedding = yarn.YarnRotaryEmbedding(64, use_cpu_initialization=True, **settings)
        emb, factor = embedding.get_emb(512)
    return emb[:, 0, 0, :32].numpy(), factor, emb


def test_yarn() -> None:
    """Rows 7, 8 and 22: YaRN by default, within the original context too; float32 angles; cos and
    sin are multiplied by 1.369 and the softmax scale by 1, so that the rotated part of a score is
    1.874 times larger."""
    fields = config.MLATransformerConfig.__dataclass_fields__
    names = ("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")
    assert [fields[name].default for name in names] == ["yarn", 40, 1.0, 0.0]
    theirs, factor, _ = angles(scaling_factor=40.0)
    ours = np.outer(np.arange(512), rope_frequencies(64, 1e4, Yarn()))
    off = float(np.max(np.abs(theirs[1:] / ours[1:] - 1)))
    print(f"YaRN's angles: {off:.1e}")
    assert 1e-9 < off < FLOAT32
    assert factor == yarn_mscale(40.0, 1.0) / yarn_mscale(40.0, 0.0)
    assert (round(factor, 3), round(factor**2, 3)) == (1.369, 1.874)
    assert yarn._yarn_get_mscale(40.0, 0.0) == 1.0
    assert angles(scaling_factor=40.0, mscale=1.0, mscale_all_dim=1.0)[1] == 1.0


def test_rope_layout() -> None:
    """Row 27: pairs lie next to each other; q and k come out in another order, scores do not."""
    _, _, emb = angles(scaling_factor=40.0)
    q, k = RNG.normal(size=(2, 1, 512, 1, 64))
    turned = [
        rope._apply_rotary_pos_emb_bshd(
            torch.tensor(x[0][:, None]), emb.double(), mla_rotary_interleaved=True
        )[:, 0, 0].numpy()
        for x in (q, k)
    ]
    inv_freq = rope_frequencies(64, 1e4, Yarn())
    for layout, same in (("interleaved", True), ("halves", False)):
        ours = [
            rope_forward(x, positions=np.arange(512), inv_freq=inv_freq, layout=layout)[0][0, :, 0]
            for x in (q, k)
        ]
        off = relative(ours[0] @ ours[1].T, turned[0] @ turned[1].T)
        assert (off < 1e-4) == same
    assert relative(ours[0], turned[0]) > 0.1


def test_vocabulary_parallel_loss(group: Any) -> None:
    """Row 22: float32 inside, whatever it is given."""
    z, targets = 3 * RNG.normal(size=(5, 3, 50)), RNG.integers(0, 50, (5, 3))
    leaf = torch.tensor(z, requires_grad=True)
    each = cross_entropy.vocab_parallel_cross_entropy(
        leaf * 1.0, torch.tensor(targets), tp_group=group
    )
    assert each.dtype == torch.float32
    each.double().mean().backward()
    loss, saved = cross_entropy_forward(z, targets=targets, mask=np.ones((5, 3), bool))
    grad = cross_entropy_backward(1.0, saved)
    one = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets[..., None], -1)[..., 0]
    assert relative(loss, np.mean(one)) < 1e-14
    off = relative(one, each.detach().double().numpy())
    print(f"vocabulary-parallel loss: {off:.1e}")
    assert 1e-10 < off < FLOAT32
    assert relative(grad, leaf.grad.numpy()) < FLOAT32


def test_mtp_normaliser_and_tail() -> None:
    """Row 3: each module's sum is divided by its own valid targets, λ 0.1; row 23: the last k
    positions read token 0; row 24: `mtp_detach_heads` makes the head's weight a constant."""
    tokens = torch.arange(1, 7)[None]
    assert mtp.roll_tensor(tokens)[0].tolist() == [[2, 3, 4, 5, 6, 0]]
    assert config.TransformerConfig.__dataclass_fields__["mtp_loss_scaling_factor"].default == 0.1
    hidden = torch.tensor(RNG.normal(size=(18, 1, 4)), requires_grad=True)  # main and two modules
    weight = torch.tensor(RNG.normal(size=(9, 4)), requires_grad=True)

    def run(detach: bool) -> tuple[Any, Any]:
        hidden.grad = weight.grad = None
        output_layer = lambda x, weight, runtime_gather_output: (x @ weight.T, None)  # noqa: E731
        mtp.process_mtp_loss(
            hidden,
            labels=torch.tensor([[2, 3, 4, 5, 6, 7]]),
            loss_mask=torch.ones(1, 6, dtype=torch.float64),
            output_layer=output_layer,
            output_weight=weight,
            runtime_gather_output=None,
            is_training=False,
            compute_language_model_loss=lambda labels, z: torch.nn.functional.cross_entropy(
                z[:, 0], labels[0], reduction="none"
            )[None],
            config=SimpleNamespace(
                mtp_num_layers=2,
                mtp_detach_heads=detach,
                mtp_loss_scaling_factor=0.1,
                calculate_per_token_loss=False,
            ),
        ).sum().backward()
        return hidden.grad, weight.grad

    found, head = run(False)
    assert head is not None
    for k in (1, 2):
        state = hidden.detach().numpy()[6 * k : 6 * k + 6 - k, 0]
        targets = np.arange(2 + k, 8)
        _, saved = cross_entropy_forward(
            (state @ weight.detach().numpy().T)[None],
            targets=targets[None],
            mask=np.ones((1, 6 - k), bool),
        )
        dz = cross_entropy_backward(1.0, saved)[0]
        wanted = 0.1 / 2 * dz @ weight.detach().numpy()  # mean over its own 6 − k targets
        np.testing.assert_allclose(
            found.numpy()[6 * k : 6 * k + 6 - k, 0], wanted, rtol=1e-6, atol=1e-9
        )
        assert not found.numpy()[6 * k + 6 - k : 6 * k + 6].any()
    assert run(True)[1] is None


@contextmanager
def micro_batches(per_token: bool) -> Iterator[Callable[[Any, int], None]]:
    """Its step from the sum of one of two micro-batches, and how many tokens count in it, to the
    gradients."""
    settings = SimpleNamespace(
        calculate_per_token_loss=per_token,
        timers=None,
        num_moe_experts=8,
        mtp_num_layers=1,
        grad_scale_func=None,
        experimental_attention_variant=None,
    )

    def step(total: Any, count: int) -> None:
        function = lambda output: (output, torch.tensor(count, dtype=torch.int), {})  # noqa: E731
        loss, _ = schedules.forward_step_calc_loss(
            None, total * 1.0, function, settings, None, False, 2, [], 1, True
        )
        loss.backward()

    with (
        mock.patch.object(mtp.MTPLossAutoScaler, "main_loss_backward_scale", None),
        mock.patch.object(moe.MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
    ):
        yield step


@pytest.mark.parametrize("per_token", [False, True])
def test_micro_batches(per_token: bool) -> None:
    """Rows 30 and 31: two of one row each, 6 and 2 targets of the main loss, 5 and 1 of module 1.
    By default means of means; per token, where `finalize_model_grads` divides by all 8, the main
    loss is the whole's, and each part's mean of module 1 is weighted by its main count."""
    weight = torch.tensor(RNG.normal(size=(9, 4)))
    lengths, labels = (6, 2), np.arange(2, 8)
    output_layer = lambda x, weight, runtime_gather_output: (x @ weight.T, None)  # noqa: E731
    each = lambda labels, z: torch.nn.functional.cross_entropy(  # noqa: E731
        z[:, 0], labels[0], reduction="none"
    )[None]
    means = "the mean of the parts' means"
    rule = "each part's mean, weighted by its main count" if per_token else means
    counts = {
        "main": TermCounts([6.0, 2.0], [6.0, 6.0], [6.0, 2.0]),
        "mtp.1": TermCounts([5.0, 1.0], [6.0, 6.0], [6.0, 2.0]),
    }
    main = rules("main", counts["main"], 2)["right" if per_token else means]
    module = rules("mtp.1", counts["mtp.1"], 2)[rule]
    for part, length in enumerate(lengths):
        hidden = torch.tensor(RNG.normal(size=(12, 1, 4)), requires_grad=True)
        mask = torch.tensor((np.arange(6) < length)[None], dtype=torch.float64)
        settings = SimpleNamespace(
            mtp_num_layers=1,
            mtp_detach_heads=False,
            mtp_loss_scaling_factor=0.1,
            calculate_per_token_loss=per_token,
        )
        with micro_batches(per_token) as step:
            state = mtp.process_mtp_loss(
                hidden,
                labels=torch.tensor(labels[None]),
                loss_mask=mask,
                output_layer=output_layer,
                output_weight=weight,
                runtime_gather_output=None,
                is_training=False,
                compute_language_model_loss=each,
                config=settings,
            )
            z = output_layer(state, weight, None)[0]
            step((each(torch.tensor(labels[None]), z) * mask).sum(), length)
        found = hidden.grad.numpy()[:, 0] / (sum(lengths) if per_token else 1)
        for depth, factor in ((0, main[part]), (1, 0.1 * module[part])):
            count = length - depth
            x = hidden.detach().numpy()[6 * depth : 6 * depth + count, 0]
            _, saved = cross_entropy_forward(
                (x @ weight.numpy().T)[None],
                targets=labels[None, depth : depth + count],
                mask=np.ones((1, count), bool),
            )
            wanted = factor * count * cross_entropy_backward(1.0, saved)[0] @ weight.numpy()
            np.testing.assert_allclose(
                found[6 * depth : 6 * depth + count], wanted, rtol=1e-6, atol=1e-9
            )


def test_mtp_order() -> None:
    """Row 1: the embedding of the next token comes first; row 4: at position 0 too."""
    same = lambda x: x  # noqa: E731
    layer = SimpleNamespace(
        enorm=same,
        hnorm=same,
        eh_proj=lambda x: (x, None),
        cp_group=None,
        tp_group=None,
        sequence_parallel=False,
        config=SimpleNamespace(sequence_parallel=False, mtp_detach_heads=False),
    )
    state, table = torch.zeros(3, 1, 2), torch.tensor(RNG.normal(size=(9, 2)))
    tokens = torch.tensor([[4, 5, 6]])
    positions = torch.arange(3)[None]
    lookup = lambda input_ids, position_ids: table[input_ids].transpose(0, 1)  # noqa: E731
    with (
        mock.patch.object(mtp, "gather_from_tensor_model_parallel_region", lambda x, group: x),
        mock.patch.object(mtp, "apply_module", same),
    ):
        *_, embedding, kept = mtp.MultiTokenPredictionLayer._get_embeddings(
            layer, tokens, positions, lookup, state
        )
        joined = mtp.MultiTokenPredictionLayer._concat_embeddings(layer, kept, embedding)
    wanted = torch.cat([table[torch.tensor([5, 6, 0])], torch.zeros(3, 2)], dim=1)
    assert torch.equal(joined[:, 0], wanted)


def sequence_loss(z: np.ndarray, group: Any, padding: np.ndarray | None = None) -> Any:
    """Its sequence-wise balance loss of gate logits [T, B, E] with α 1, K 2, and its gradient."""
    t, b, e = z.shape
    leaf = torch.tensor(z, requires_grad=True)
    mask = None if padding is None else torch.tensor(padding).reshape(-1)
    counted, scores = moe.compute_routing_scores_for_aux_loss(
        leaf.reshape(-1, e), 2, "sigmoid", padding_mask=mask
    )
    kept: list[Any] = []
    gate = SimpleNamespace(
        get_aux_loss_coeff=lambda kind: 1.0,
        tp_cp_group=group,
        topk=2,
        config=SimpleNamespace(num_moe_experts=e, moe_router_fusion=False),
        attach_and_log_load_balancing_loss=lambda probs, alpha, loss, *_, **__: kept.append(loss),
    )
    router.TopKRouter._apply_seq_aux_loss(
        gate, None, scores, counted, t, b, with_padding_mask=mask is not None
    )
    kept[0].backward()
    return kept[0].item(), leaf.grad.numpy()


def test_balance_loss(group: Any) -> None:
    """Row 9: as the paper; of padded sequences each is divided by the square of the batch's mean
    length."""
    fields = config.TransformerConfig.__dataclass_fields__
    assert fields["moe_aux_loss_coeff"].default == 0
    assert fields["moe_router_load_balancing_type"].default == "aux_loss"
    lengths = np.array([11, 7, 4])
    z = RNG.normal(size=(11, 3, 8))
    s = 1 / (1 + np.exp(-z.transpose(1, 0, 2)))

    def ours(mask: np.ndarray | None) -> tuple[float, np.ndarray]:
        loss, saved = balance_loss_forward(s, alpha=1.0, top_k=2, mask=mask)
        return float(loss), (balance_loss_backward(1.0, saved) * s * (1 - s)).transpose(1, 0, 2)

    a, b = ours(None), sequence_loss(z, group)
    assert relative(a[0], b[0]) < FLOAT32
    assert relative(a[1], b[1]) < 1e-5  # small beside the terms that it is the difference of
    padding = np.arange(11)[:, None] >= lengths
    a, b = ours(~padding.T), sequence_loss(z, group, padding)
    times = (lengths / lengths.mean()) ** 2
    assert times.round(2).tolist() == [2.25, 0.91, 0.3]
    assert relative(a[1] * times[:, None], b[1]) < 1e-5
    each = [
        float(balance_loss_forward(s[n : n + 1, :length], alpha=1.0, top_k=2)[0])
        for n, length in enumerate(lengths)
    ]
    assert relative(np.mean(each), a[0]) < 1e-14
    assert relative(np.mean(each * times), b[0]) < FLOAT32


def gate_of(group: Any, per_token: bool) -> Any:
    """As much of its router as the balance losses read, with α 1 and K 2."""
    gate = SimpleNamespace(
        get_aux_loss_coeff=lambda kind: 1.0,
        tp_cp_group=group,
        tp_dp_cp_group=group,
        topk=2,
        calculate_per_token_loss=per_token,
        is_mtp_layer=False,
        layer_number=1,
        global_tokens_per_expert=torch.zeros(8),
        ga_steps=torch.tensor(0.0),
        config=SimpleNamespace(
            num_moe_experts=8, moe_router_fusion=False, num_layers=1, mtp_num_layers=None
        ),
    )
    attach = router.TopKRouter.attach_and_log_load_balancing_loss
    gate.attach_and_log_load_balancing_loss = lambda *a, **how: attach(gate, *a, **how)
    return gate


def attached(gate: Any, kind: str, z: np.ndarray, length: int, counted: int) -> np.ndarray:
    """The gradient that its balance loss of this kind gives gate logits [B, T, E] of a micro-batch,
    tokens from ``length`` on padding, where ``counted`` tokens count in the main loss."""
    b, t, e = z.shape
    leaf = torch.tensor(z, requires_grad=True)
    padding = torch.tensor((np.arange(t) >= length)[:, None].repeat(b, 1)).reshape(-1)
    map_, scores = moe.compute_routing_scores_for_aux_loss(
        leaf.transpose(0, 1).reshape(-1, e), 2, "sigmoid", padding_mask=padding
    )
    apply = getattr(router.TopKRouter, f"_apply_{kind}")
    sizes = (t, b) if kind == "seq_aux_loss" else ()
    with micro_batches(gate.calculate_per_token_loss) as step:
        probs = torch.zeros(b * t, e, dtype=torch.float64, requires_grad=True)
        out = apply(gate, probs * 1.0, scores, map_, *sizes, with_padding_mask=True)
        step(out.sum(), counted)
    return np.asarray(leaf.grad)


def our_gate(z: np.ndarray, length: int, **how: Any) -> np.ndarray:
    """The same of our balance loss, α 1: of each sequence's first ``length`` tokens."""
    s = 1 / (1 + np.exp(-z[:, :length]))
    _, saved = balance_loss_forward(s, alpha=1.0, top_k=2, **how)
    found = np.zeros_like(z)
    found[:, :length] = balance_loss_backward(1.0, saved) * s * (1 - s)
    return found


def test_balance_loss_of_micro_batches(group: Any) -> None:
    """Row 32: two micro-batches, sequences of 11 and 4 tokens; seq_aux_loss is the mean of means,
    here right, and per token each weighted by its tokens over the targets of all; aux_loss counts f
    over the micro-batch; global_aux_loss over those so far, each as if as long as this one."""
    z, lengths = RNG.normal(size=(2, 1, 11, 8)), (11, 4)
    for per_token, targets in ((False, (11, 4)), (True, (11, 4)), (True, (6, 2))):
        for part, length in enumerate(lengths):
            found = attached(
                gate_of(group, per_token), "seq_aux_loss", z[part], length, targets[part]
            )
            factor = length / sum(targets) if per_token else 1 / 2
            if per_token:
                found /= sum(targets)
            assert relative(found, factor * our_gate(z[part], length)) < 1e-5
    two = RNG.normal(size=(2, 11, 8))
    both = attached(gate_of(group, False), "aux_loss", two, 11, 22)
    joined = our_gate(two.reshape(1, 22, 8), 22).reshape(2, 11, 8)
    assert relative(both, joined / 2) < 1e-5
    assert relative(both, our_gate(two, 11) / 2) > 1e-2
    gate, counts = gate_of(group, False), 0.0
    for part, (length, times) in enumerate(((11, 1.0), (4, 15**2 / (2 * 4**2)))):
        s = 1 / (1 + np.exp(-z[part, :, :length]))
        best = np.argsort(-s, axis=-1)[..., :2]
        own, _ = count_choices(best, 8, np.ones((1, length, 1), bool))
        counts = counts + own
        found = attached(gate, "global_aux_loss", z[part], length, length)
        so_far = (counts, np.array([float(sum(lengths[: part + 1]))]))
        assert relative(found, times / 2 * our_gate(z[part], length, cut=so_far)) < 1e-5


def test_bias_update(group: Any) -> None:
    """Row 10: not centred; loads are counted where gradients are recorded."""
    loads = np.array([9.0, 1.0, 1.0, 1.0])
    found = moe.get_updated_expert_bias(torch.tensor(loads), torch.zeros(4), 1e-3, group)
    np.testing.assert_allclose(found.numpy(), bias_update(np.zeros(4), loads, 1e-3), rtol=1e-6)
    gate = SimpleNamespace(enable_expert_bias=True, local_tokens_per_expert=torch.zeros(4))
    chosen = torch.ones(5, 4, dtype=torch.bool)
    router.TopKRouter._apply_expert_bias(gate, chosen)
    with torch.no_grad():
        router.TopKRouter._apply_expert_bias(gate, chosen)
    assert gate.local_tokens_per_expert.tolist() == [5] * 4


def routes(z: np.ndarray, k: int, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Its weights [T, K] of gate logits, and its experts, in their order."""
    weights, experts = moe.topk_routing_with_score_function(
        torch.tensor(z), k, dense_output=True, **settings
    )
    order = experts.argsort(dim=1)
    return weights.gather(1, order).numpy(), experts.gather(1, order).numpy()


def our_routes(z: np.ndarray, k: int, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    output, _ = router_forward(z, np.eye(z.shape[1]), top_k=k, **settings)
    order = np.argsort(output.indices, axis=1)
    pair = (output.weights, output.indices)
    weights, experts = (np.take_along_axis(np.asarray(x), order, 1) for x in pair)
    return weights, experts


def test_the_gate() -> None:
    """Rows 5, 11, 12, 22 and 28: hidden groups get −∞; float32 scores, and 1e-20 added unless K is
    1, which is not normalised; groups by their best K // kept, bias or not; weights are scores."""
    gate = SimpleNamespace(weight=torch.ones(8, 4).bfloat16(), bias=None)
    for setting, kind in ((None, torch.bfloat16), ("fp32", torch.float32)):
        gate.config = SimpleNamespace(moe_router_dtype=setting)
        with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
            product = router.TopKRouter.gating(gate, torch.ones(3, 4).bfloat16())
        assert product.dtype == kind
    z, bias = RNG.normal(size=(64, 8)), RNG.normal(size=8) - 2
    groups = {"num_groups": 4, "group_topk": 2}
    ours = {"groups": 4, "keep_groups": 2, "group_score": "share"}
    for b in (None, bias):
        given = None if b is None else torch.tensor(b)
        found = routes(z, 2, score_function="sigmoid", expert_bias=given, **groups)
        wanted = our_routes(z, 2, bias=b, **ours)
        assert np.array_equal(found[1], wanted[1])
        assert 1e-10 < relative(wanted[0], found[0]) < FLOAT32
        other = our_routes(z, 2, bias=b, **(ours | {"group_score": "top2"}))
        assert not np.array_equal(found[1], other[1])
    zero = our_routes(z, 2, bias=bias, masked_groups="zero", **ours)
    assert not np.array_equal(
        routes(z, 2, score_function="sigmoid", expert_bias=torch.tensor(bias), **groups)[1], zero[1]
    )
    low = np.full((1, 8), -200.0)  # sigmoid underflows in float32
    assert not routes(low, 2, score_function="sigmoid")[0].any()
    one = routes(z, 1, score_function="sigmoid")
    assert relative(our_routes(z, 1, normalise=False)[0], one[0]) < FLOAT32
    assert relative(our_routes(z, 1)[0], one[0]) > 0.1


def test_what_a_softmax_gate_ranks() -> None:
    """Row 29: logits, and the softmax is over the chosen, unless `use_pre_softmax`."""
    z = 2 * RNG.normal(size=(256, 8))
    groups = {"num_groups": 4, "group_topk": 1}
    ours = {"groups": 4, "keep_groups": 1, "group_score": "share", "score": "softmax"}
    post, pre = routes(z, 2, **groups), routes(z, 2, use_pre_softmax=True, **groups)
    by_logits = our_routes(z, 2, ranking="logits", **ours)  # normalised scores of the chosen
    assert np.array_equal(post[1], by_logits[1])
    assert relative(by_logits[0], post[0]) < FLOAT32
    by_scores = our_routes(z, 2, normalise=False, **ours)
    assert np.array_equal(pre[1], by_scores[1])
    assert relative(by_scores[0], pre[0]) < FLOAT32
    assert not np.array_equal(post[1], pre[1])
