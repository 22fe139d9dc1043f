"""The whole DeepSeek-V3 model: forward to the loss, backward to a gradient for every parameter.

Embedding, dense blocks, mixture-of-experts blocks, final norm, head, and the chain of MTP modules;
the loss is main + λ/depth · Σ MTP + Σ balance. A block is two sublayers, attention and a network,
each added to the stream; every backward below its forward makes the same calls in reverse. This is
the one place where gradients of a shared tensor or stream are summed.
Sources: DeepSeek-V3 (2412.19437) sections 2.1 and 2.2. Derivation: derivations/README.md, "The
model".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from .array import Array, cast, expect, expect_that, library, number, real, zeros
from .batch import Batch, Whole, make_batch
from .config import ModelConfig
from .ops import (
    REFERENCE,
    Op,
    Ops,
    RouterOutput,
    attention_backward,
    attention_forward,
    expert_load,
    rope_frequencies,
    select_experts,
    yarn_softmax_factor,
)
from .ops.leaves import expect_table
from .parameters import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    GATE_BIAS,
    HEAD,
    MTP,
    MTP_NORM,
    NETWORK_NORM,
    Parameters,
    attention_names,
    check_parameters,
    dense_names,
    experts_names,
    head_name,
    is_buffer,
    layer_name,
    mtp_layer,
)

__all__ = ["ModelOutput", "Route", "backward", "forward", "logits"]


class Route(NamedTuple):
    """The choices of one MoE layer, which replay as constants."""

    indices: Array  # [B, T, K]: the routed experts
    counted: Array  # [B, T, K]: what the balance loss counts


class Choices(NamedTuple):
    """What one MoE layer tells of itself, once per batch."""

    route: Route
    load: Array  # [E]
    balance: Array | None  # scalar; None without loss


class ModelOutput(NamedTuple):
    """What `forward` returns beside the saved record: logits, losses, and the routes of each MoE
    layer."""

    hidden: Array  # [B, T, D], after the final norm: what the head and `log_prob` read
    loss: Array | None  # scalar main + λ/depth Σ mtp + Σ balance; None without loss
    main: Array | None  # scalar
    mtp: list[Array]  # scalar of each module, before λ
    balance: dict[int, Array]  # scalar of each MoE layer, with its α
    routes: dict[int, Route]  # by layer, MTP modules included
    loads: dict[int, Array]  # [E] of each MoE layer: tokens per expert, padding left out


class AttentionSublayerSaved(NamedTuple):
    norm: Any
    mla: Any
    cache: Array  # [B, S, C + R]: for the tokens that follow


class DenseSublayerSaved(NamedTuple):
    norm: Any
    ffn: Any


class ExpertsSublayerSaved(NamedTuple):
    norm: Any
    router: Any
    balance_loss: Any  # None without loss
    moe: Any
    routed: RouterOutput


class BlockSaved(NamedTuple):
    attention: AttentionSublayerSaved
    network: DenseSublayerSaved | ExpertsSublayerSaved
    choices: Choices | None  # None in a dense block


class BlockInput(NamedTuple):
    """In place of `BlockSaved` where the backward makes the block's forward again."""

    x: Array  # [B, T, D]
    batch: Batch
    choices: Choices | None  # whose route it replays


class MTPModuleSaved(NamedTuple):
    given: int  # positions of the state that it was handed, and of which it may read fewer
    embedding: Any
    keep: Array | None  # [B, T−k, 1]: 0 where the convention zeroes the embedding
    mtp: Any
    block: Any  # BlockSaved or BlockInput
    norm: Any


class ModelSaved(NamedTuple):
    run: Run
    embedding: Any
    blocks: list[Any]  # of BlockSaved or BlockInput
    norm: Any
    hidden: Array  # [B, T, D]: the head's input, for dlogits
    head: Any  # None without loss
    mtp: list[MTPModuleSaved]
    mtp_heads: list[Any]


class Run(NamedTuple):
    """What every block of one forward shares."""

    params: Parameters
    config: ModelConfig
    ops: Ops
    routes: Mapping[int, Route] = {}  # by layer: choices to replay
    with_loss: bool = True
    caches: Mapping[int, Array] = {}  # by layer [B, S − T, C + R]: of the tokens before these
    recompute: bool = False  # a block's forward in the backward

    def weights(self, layer: int, names: Iterable[str | None]) -> list[Array | None]:
        """A layer's tensors; None where the name is."""
        return [None if name is None else self.params[layer_name(layer, name)] for name in names]

    def weight(self, layer: int, name: str) -> Array:
        return self.params[layer_name(layer, name)]


def forward(
    params: Parameters,
    tokens: Array,
    config: ModelConfig,
    *,
    targets: Array | None = None,
    mask: Array | None = None,
    key_mask: Array | None = None,
    segments: Array | None = None,
    positions: Array | None = None,
    routes: Mapping[int, Route] | None = None,
    whole: Whole | None = None,
    follow: int = 0,
    ops: Ops = REFERENCE,
    with_loss: bool = True,
    recompute: bool = False,
) -> tuple[ModelOutput, ModelSaved]:
    """Run the model over ``tokens`` [B, T] and, unless ``with_loss`` is false, to the training
    loss.

    Args:
        params: every tensor of `parameter_shapes`.
        targets: [B, T], the token that follows each position. By default the tokens shifted by one,
            and the last position has none; the paper's L_k over T terms needs the token after the
            last: give it here.
        mask: [B, T] bool, which positions' targets count; by default all but padding. Without
            ``targets``, only those whose next token exists, is no padding and lies in the same
            document; True elsewhere is a ValueError.
        key_mask: [B, T] bool, False for padding, which nobody sees and no loss or load counts.
        segments: [B, T] integers, the document of each position; attention stays within one, and an
            MTP module leaves out the positions whose later token lies in another.
        positions: [B, T] or [T] for RoPE, default 0 … T − 1.
        routes: by layer, choices to replay instead of selecting experts.
        whole: counts of the batch that this is a part of. The losses are then the part's share, and
            the sum over all parts, of losses and of gradients, is the whole batch's.
        follow: how many of the last tokens are not the part's own but follow it in its sequences:
            what MTP modules read and predict at its end. Where sequences are cut,
            ``ops.attention`` must fetch the keys before the part.
        ops: the table of implementations, ``REFERENCE | {name: Op(forward, backward)}``.
        recompute: keep no activations of the blocks but their inputs; the backward makes each
            block's forward again, on the same routes. The gradients have the same bits.

    Returns (ModelOutput, saved). ValueError names every tensor that is missing or misshapen.
    """
    expect_table(ops, Ops)
    check_parameters(params, config)
    batch = make_batch(
        params[EMBEDDING],
        tokens,
        config,
        targets=targets,
        mask=mask,
        key_mask=key_mask,
        segments=segments,
        positions=positions,
        whole=whole,
        follow=follow,
        with_loss=with_loss,
    )
    run = Run(
        params, config, ops_for(batch, config, ops), routes or {}, with_loss, recompute=recompute
    )
    x, embedding_saved = ops.embedding.forward(params[EMBEDDING], ids=batch.tokens)
    blocks = []
    for layer in range(config.layers):
        x, saved = block_forward(run, layer, x, batch)
        blocks.append(saved)
    hidden, norm_saved = final_norm_forward(run, x)
    loss = main = head_saved = None
    mtp: list[Array] = []
    modules: list[MTPModuleSaved] = []
    mtp_heads: list[Any] = []
    if with_loss:
        main, head_saved = head_forward(run, hidden, batch)
        state = mtp_input(config, hidden, x)
        for depth in range(1, config.mtp_depth + 1):
            later = batch.at(depth)
            state, normed, module = mtp_module_forward(run, depth, state, later)
            mtp_loss, mtp_head = head_forward(run, normed, later)
            mtp.append(mtp_loss)
            modules.append(module)
            mtp_heads.append(mtp_head)
    every = enumerate([*blocks, *(module.block for module in modules)])
    moe = {layer: block.choices for layer, block in every if block.choices is not None}
    balance = {layer: told.balance for layer, told in moe.items() if told.balance is not None}
    if with_loss:
        loss = total_loss(config, main, mtp, balance)
    output = ModelOutput(
        hidden,
        loss,
        main,
        mtp,
        balance,
        routes={layer: told.route for layer, told in moe.items()},
        loads={layer: told.load for layer, told in moe.items()},
    )
    return output, ModelSaved(
        run, embedding_saved, blocks, norm_saved, hidden, head_saved, modules, mtp_heads
    )


def backward(
    saved: ModelSaved,
    *,
    dloss: Array | None = None,
    dlogits: Array | None = None,
    dhidden: Array | None = None,
) -> dict[str, Array]:
    """A gradient for every parameter, from the loss or from any gradient that another loss hands
    over.

    Args:
        dloss: scalar, of ``ModelOutput.loss``; 1 if all three are None.
        dlogits: [B, T, W], of `logits`. dhidden: [B, T, D], of ``ModelOutput.hidden``
            (`log_prob_backward` gives it, with the head's own gradient, which the caller then
            adds).

    Given together, they add up. The gate's bias, a buffer, is left out.
    """
    run = saved.run
    if dloss is None and dlogits is None and dhidden is None:
        dloss = 1.0
    expect_that(
        dloss is None or saved.head is not None,
        "dloss needs a forward with with_loss=True, got one without a loss",
    )
    grads = Gradients(run.params)
    dx = above_backward(saved, dloss, dlogits, dhidden, grads)
    for layer in range(run.config.layers - 1, -1, -1):
        dx = block_backward(run, layer, dx, dloss, saved.blocks[layer], grads)
    grads.add(EMBEDDING, run.ops.embedding.backward(dx, saved.embedding))
    return grads.complete()


class Gradients:
    """Sums of gradients by parameter name: a tensor with two users gets two contributions."""

    def __init__(self, params: Parameters) -> None:
        self.params = params
        self.sums: dict[str, Array] = {}

    def add(self, name: str, gradient: Array | None) -> None:
        if gradient is not None:
            self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient

    def add_layer(
        self, layer: int, names: Sequence[str | None], gradients: Sequence[Array | None]
    ) -> None:
        """Those of a layer's tensors; a name that is None has the gradient None."""
        for name, gradient in zip(names, gradients, strict=True):
            if name is not None:
                self.add(layer_name(layer, name), gradient)

    def complete(self) -> dict[str, Array]:
        """In the order of the parameters; a parameter that took no part gets zeros of the others'
        type."""
        return {
            name: self.sums[name]
            if name in self.sums
            else zeros(p.shape, next(iter(self.sums.values())))
            for name, p in self.params.items()
            if not is_buffer(name)
        }


# A block: two sublayers


def block_forward(run: Run, layer: int, x: Array, batch: Batch) -> tuple[Array, Any]:
    """x + MLA(norm(x)), then x + network(norm(x)): a dense one, or a mixture of experts. Saved is
    `BlockSaved`, or with ``run.recompute`` `BlockInput`."""
    y, attention = attention_sublayer_forward(run, layer, x, batch)
    middle = x + y
    network: DenseSublayerSaved | ExpertsSublayerSaved
    choices = None
    if layer < run.config.dense_layers:
        y, network = dense_sublayer_forward(run, layer, middle)
    else:
        y, network, choices = experts_sublayer_forward(run, layer, middle, batch)
    return middle + y, (
        BlockInput(x, batch, choices) if run.recompute else BlockSaved(attention, network, choices)
    )


def block_backward(
    run: Run, layer: int, dx: Array, dloss: Array | None, saved: Any, grads: Gradients
) -> Array:
    """The gradient of the block's input from that of its output; adds those of its parameters to
    ``grads``. ``saved`` is a BlockSaved, or a BlockInput, whose forward is made again first."""
    if isinstance(saved, BlockInput):
        routes = {} if saved.choices is None else {layer: saved.choices.route}
        again = run._replace(routes=routes, recompute=False)
        _, saved = block_forward(again, layer, saved.x, saved.batch)
    if isinstance(saved.network, DenseSublayerSaved):
        dx_network = dense_sublayer_backward(run, layer, dx, saved.network, grads)
    else:
        dx_network = experts_sublayer_backward(run, layer, dx, dloss, saved.network, grads)
    dx = dx + dx_network
    dx_attention = attention_sublayer_backward(run, layer, dx, saved.attention, grads)
    return dx + dx_attention


def attention_sublayer_forward(
    run: Run, layer: int, x: Array, batch: Batch
) -> tuple[Array, AttentionSublayerSaved]:
    """y = MLA(norm(x)), behind the layer's cache if there is one."""
    config, yarn = run.config, run.config.active_yarn
    frequencies = rope_frequencies(config.rope, config.theta, yarn)
    norm = run.weight(layer, ATTENTION_NORM)
    h, norm_saved = run.ops.rms_norm.forward(x, norm, eps=config.norm_eps)
    output, mla_saved = run.ops.mla.forward(
        h,
        run.caches.get(layer),
        *run.weights(layer, attention_names(config)),
        heads=config.heads,
        scale=(config.nope + config.rope) ** -0.5 * yarn_softmax_factor(yarn),
        eps=config.latent_eps,
        positions=batch.positions,
        layout=config.conventions.rope_layout,
        inv_freq=library(x).asarray(frequencies, device=x.device),
        factor=config.rope_factor,
        key_mask=batch.takes_part,
        segments=batch.segments,
        ops=run.ops,
    )
    return output.y, AttentionSublayerSaved(norm_saved, mla_saved, output.cache)


def attention_sublayer_backward(
    run: Run, layer: int, dy: Array, saved: AttentionSublayerSaved, grads: Gradients
) -> Array:
    """dx from ``dy``; no gradient comes back from the cache."""
    dh, _, *dw = run.ops.mla.backward((dy, None), saved.mla)
    grads.add_layer(layer, attention_names(run.config), dw)
    dx, dw_norm = run.ops.rms_norm.backward(dh, saved.norm)
    grads.add_layer(layer, [ATTENTION_NORM], [dw_norm])
    return dx


def dense_sublayer_forward(run: Run, layer: int, x: Array) -> tuple[Array, DenseSublayerSaved]:
    """y = FFN(norm(x))."""
    norm = run.weight(layer, NETWORK_NORM)
    h, norm_saved = run.ops.rms_norm.forward(x, norm, eps=run.config.norm_eps)
    y, ffn_saved = run.ops.ffn.forward(h, *run.weights(layer, dense_names()), ops=run.ops)
    return y, DenseSublayerSaved(norm_saved, ffn_saved)


def dense_sublayer_backward(
    run: Run, layer: int, dy: Array, saved: DenseSublayerSaved, grads: Gradients
) -> Array:
    dh, *dw = run.ops.ffn.backward(dy, saved.ffn)
    grads.add_layer(layer, dense_names(), dw)
    dx, dw_norm = run.ops.rms_norm.backward(dh, saved.norm)
    grads.add_layer(layer, [NETWORK_NORM], [dw_norm])
    return dx


def experts_sublayer_forward(
    run: Run, layer: int, x: Array, batch: Batch
) -> tuple[Array, ExpertsSublayerSaved, Choices]:
    """y = MoE(norm(x)), with the layer's route, load and balance loss."""
    config, ops = run.config, run.ops
    normalise, scale = config.weight_rule
    norm, gate = run.weights(layer, [NETWORK_NORM, GATE])
    h, norm_saved = ops.rms_norm.forward(x, norm, eps=config.norm_eps)
    replay = run.routes.get(layer)
    routed, router_saved = ops.router.forward(
        h,
        gate,
        top_k=config.top_k,
        bias=run.params.get(layer_name(layer, GATE_BIAS)),
        groups=config.groups,
        keep_groups=config.keep_groups,
        group_score=config.group_score,
        score=config.gate,
        normalise=normalise,
        scale=scale,
        epsilon=config.conventions.gate_epsilon,
        masked_groups=config.conventions.masked_groups,
        ranking=config.ranking,
        routes=None if replay is None else replay.indices,
    )
    counted = _counted(config, routed) if replay is None else replay.counted
    takes_part = None if batch.takes_part is None else batch.takes_part[:, -x.shape[1] :]
    load = expert_load(routed.indices, config.experts, takes_part)
    balance = balance_saved = None
    if run.with_loss:
        balance, balance_saved = ops.balance_loss.forward(
            routed.scores,
            alpha=config.balance_weight,
            top_k=config.top_k,
            counted=counted,
            mask=batch.takes_part,
            sequences=batch.whole.sequences,
            cut=batch.whole.cut.get(layer),
        )
    weights = run.weights(layer, experts_names(config))
    y, moe_saved = ops.moe.forward(h, routed.weights, *weights, indices=routed.indices, ops=ops)
    saved = ExpertsSublayerSaved(norm_saved, router_saved, balance_saved, moe_saved, routed)
    return y, saved, Choices(Route(routed.indices, counted), load, balance)


def experts_sublayer_backward(
    run: Run,
    layer: int,
    dy: Array,
    dloss: Array | None,
    saved: ExpertsSublayerSaved,
    grads: Gradients,
) -> Array:
    dh, dweights, *dw = run.ops.moe.backward(dy, saved.moe)
    grads.add_layer(layer, experts_names(run.config), dw)
    dscores = None
    if dloss is not None:
        dscores = run.ops.balance_loss.backward(dloss, saved.balance_loss)
    dh_gate, dw_gate = run.ops.router.backward((dweights, dscores), saved.router)
    dh = dh + dh_gate
    dx, dw_norm = run.ops.rms_norm.backward(dh, saved.norm)
    grads.add_layer(layer, [GATE, NETWORK_NORM], [dw_gate, dw_norm])
    return dx


def _counted(config: ModelConfig, routed: RouterOutput) -> Array:
    """The choices that the balance loss counts."""
    if config.conventions.balance_counts == "routed":
        return routed.indices
    return select_experts(real(routed.scores), config.top_k)


# Above the blocks: final norm, head, MTP modules, loss


def final_norm_forward(run: Run, x: Array) -> tuple[Array, Any]:
    """The hidden states [B, T, D] that the head reads."""
    return run.ops.rms_norm.forward(x, run.params[FINAL_NORM], eps=run.config.norm_eps)


def final_norm_backward(
    run: Run, dh: Array, dstate: Array | None, saved: Any, grads: Gradients
) -> tuple[Array, Array]:
    """The gradients of the last block's output and of the hidden states, from ``dh``, what the head
    makes of the latter, and ``dstate`` of what the first MTP module read."""
    if dstate is not None and run.config.mtp_starts_normed:
        dh = dh + dstate
        dstate = None
    dx, dw = run.ops.rms_norm.backward(dh, saved)
    grads.add(FINAL_NORM, dw)
    return dx if dstate is None else dx + dstate, dh


def above_backward(
    saved: ModelSaved,
    dloss: Array | None,
    dlogits: Array | None,
    dhidden: Array | None,
    grads: Gradients,
) -> Array:
    """The gradient of the last block's output, from what `backward` is given; adds those of the
    parameters above the blocks to ``grads``."""
    run = saved.run
    config, ops = run.config, run.ops
    hidden, head = saved.hidden, head_name(config)
    dh = zeros(hidden.shape, hidden)
    if dhidden is not None:
        expect("dhidden", dhidden, "(B, T, D)", tuple(hidden.shape))
        dh = dh + number(dhidden, hidden)
    if dlogits is not None:
        expect("dlogits", dlogits, "(B, T, W)", (*hidden.shape[:2], config.vocabulary))
        _, linear_saved = ops.linear.forward(hidden, run.params[head])
        dh_logits, dw = ops.linear.backward(number(dlogits, hidden), linear_saved)
        dh = dh + dh_logits
        grads.add(head, dw)
    dstate = None
    if dloss is not None:
        dh_head, dw = ops.head_cross_entropy.backward(dloss, saved.head)
        dh = dh + dh_head
        grads.add(head, dw)
        dmtp = dloss * mtp_scale(config)  # (mtp.6)
        for depth in range(config.mtp_depth, 0, -1):
            dnormed, dw = ops.head_cross_entropy.backward(dmtp, saved.mtp_heads[depth - 1])
            grads.add(head, dw)
            module = saved.mtp[depth - 1]
            dstate = mtp_module_backward(run, depth, dloss, dnormed, dstate, module, grads)
    dx, _ = final_norm_backward(run, dh, dstate, saved.norm, grads)
    return dx


def logits(params: Parameters, hidden: Array, ops: Ops = REFERENCE) -> Array:
    """The next-token logits [B, T, W] of ``hidden`` [B, T, D], that of `ModelOutput`."""
    head = HEAD if HEAD in params else EMBEDDING  # tied
    return ops.linear.forward(hidden, params[head])[0]


def head_forward(run: Run, hidden: Array, batch: Batch) -> tuple[Array, Any]:
    """The cross-entropy of one depth."""
    return run.ops.head_cross_entropy.forward(
        hidden,
        run.params[head_name(run.config)],
        targets=batch.targets,
        mask=batch.mask,
        normaliser=batch.whole.targets or None,
        ops=run.ops,
    )


def total_loss(
    config: ModelConfig, main: Array, mtp: Iterable[Array], balance: Mapping[int, Array]
) -> Array:
    """main + λ/depth Σ mtp + Σ balance."""
    loss = main
    for mtp_loss in mtp:
        loss = loss + mtp_scale(config) * mtp_loss  # (mtp.5)
    return sum(balance.values(), start=loss)


def mtp_scale(config: ModelConfig) -> float:
    """λ/depth, the weight of one MTP module's loss."""
    return config.mtp_weight / config.mtp_depth if config.mtp_depth else 0.0


def ops_for(batch: Batch, config: ModelConfig, ops: Ops) -> Ops:
    """The table of ops, with another attention if the convention gives a query that sees no key the
    mean of the values and the batch has such a query."""
    first = None if batch.takes_part is None else batch.takes_part[:, 0]
    if config.conventions.blind_query == "zero" or first is None or library(first).all(first):
        return ops
    return ops | {"attention": Op(partial(attention_forward, blind="mean"), attention_backward)}


def mtp_input(config: ModelConfig, hidden: Array, x: Array) -> Array:
    """What MTP module 1 reads of the main model: its hidden states, or the last block's output."""
    return hidden if config.mtp_starts_normed else x


def mtp_module_forward(
    run: Run, depth: int, state: Array, batch: Batch
) -> tuple[Array, Array, MTPModuleSaved]:
    """Module ``depth`` over the beginning of ``state``: what it hands to the next, its normed
    output (the head's input), and saved."""
    config, ops = run.config, run.ops
    layer = mtp_layer(config, depth)
    given, state = state.shape[1], state[:, : batch.tokens.shape[1], :]
    embedding, embedding_saved = ops.embedding.forward(run.params[EMBEDDING], ids=batch.tokens)
    keep = None
    if config.conventions.mtp_zero_first_embedding:
        keep = cast(batch.positions[..., None] != 0, state)
        embedding = embedding * keep
    x, mtp_saved = ops.mtp.forward(
        state,
        embedding,
        *run.weights(layer, MTP),
        eps=config.norm_eps,
        order=config.conventions.mtp_order,
        ops=ops,
    )
    x, block = block_forward(run, layer, x, batch)
    norm = run.weight(layer, MTP_NORM)
    normed, norm_saved = ops.rms_norm.forward(x, norm, eps=config.norm_eps)
    state = x if config.mtp_hands_on_raw else normed
    return state, normed, MTPModuleSaved(given, embedding_saved, keep, mtp_saved, block, norm_saved)


def mtp_module_backward(
    run: Run,
    depth: int,
    dloss: Array | None,
    dnormed: Array,
    dstate: Array | None,
    saved: MTPModuleSaved,
    grads: Gradients,
) -> Array:
    """The gradient of what module ``depth`` read of the previous depth, from those of its normed
    output and of what it handed to the next."""
    ops, layer = run.ops, mtp_layer(run.config, depth)
    handed_on_raw = run.config.mtp_hands_on_raw
    if dstate is not None and not handed_on_raw:
        dnormed = dnormed + dstate
    dx, dw_norm = ops.rms_norm.backward(dnormed, saved.norm)
    grads.add_layer(layer, [MTP_NORM], [dw_norm])
    if dstate is not None and handed_on_raw:
        dx = dx + dstate
    dx = block_backward(run, layer, dx, dloss, saved.block, grads)
    dread, dembedding, *dw = ops.mtp.backward(dx, saved.mtp)
    grads.add_layer(layer, MTP, dw)
    if saved.keep is not None:
        dembedding = dembedding * saved.keep
    grads.add(EMBEDDING, ops.embedding.backward(dembedding, saved.embedding))
    unread = saved.given - dread.shape[1]
    last = zeros((dread.shape[0], unread, dread.shape[2]), dread)
    return library(dread).concat((dread, last), axis=1)
