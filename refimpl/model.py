"""The whole DeepSeek-V3 model: parameters, forward to the loss, backward to a gradient for every
parameter.

Embedding, dense blocks, mixture-of-experts blocks, final norm, head, and the chain of MTP modules;
the loss is main + λ/depth · Σ MTP + Σ balance. This is the one place where gradients of a shared
tensor or stream are summed. Parameters are a flat dict under the Hugging Face names, weights [out,
in], the experts of a layer stacked [E, …]; MTP module k is ``model.layers.{layers + k − 1}``, and
shares embedding and head with the main model. Sources: DeepSeek-V3 (2412.19437) sections 2.1 and
2.2. Derivation: derivations/README.md, "The model".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .array import Array, expect, expect_ids, expect_mask, library, namespace, number, real, zeros
from .config import ModelConfig
from .ops import REFERENCE, Ops, mtp_pairs, rope_frequencies, select_experts, yarn_softmax_factor
from .ops.router import expert_load

__all__ = [
    "ModelOutput",
    "Route",
    "backward",
    "forward",
    "init_parameters",
    "is_buffer",
    "logits",
    "parameter_shapes",
]

Parameters = Mapping[str, Array]
BIAS = "mlp.gate.e_score_correction_bias"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, in the order of the forward. The gate's bias is a buffer: it
    gets no gradient."""
    c, d = config, config.width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocabulary, d)}
    for layer in range(c.layers + c.mtp_depth):
        block: dict[str, tuple[int, ...]] = {}
        if layer >= c.layers:
            block |= {"enorm.weight": (d,), "hnorm.weight": (d,), "eh_proj.weight": (d, 2 * d)}
        block["input_layernorm.weight"] = (d,)
        if c.q_latent is None:
            block["self_attn.q_proj.weight"] = (c.heads * (c.nope + c.rope), d)
        else:
            block["self_attn.q_a_proj.weight"] = (c.q_latent, d)
            block["self_attn.q_a_layernorm.weight"] = (c.q_latent,)
            block["self_attn.q_b_proj.weight"] = (c.heads * (c.nope + c.rope), c.q_latent)
        block |= {
            "self_attn.kv_a_proj_with_mqa.weight": (c.kv_latent + c.rope, d),
            "self_attn.kv_a_layernorm.weight": (c.kv_latent,),
            "self_attn.kv_b_proj.weight": (c.heads * (c.nope + c.value), c.kv_latent),
            "self_attn.o_proj.weight": (d, c.heads * c.value),
            "post_attention_layernorm.weight": (d,),
        }
        networks: list[tuple[str, tuple[int, ...], int]] = []
        if layer < c.dense_layers:
            networks = [("mlp.", (), c.dense_hidden)]
        else:
            block["mlp.gate.weight"] = (c.experts, d)
            if c.gate_bias:
                block[BIAS] = (c.experts,)
            networks = [("mlp.experts.", (c.experts,), c.expert_hidden)]
            if c.shared_experts:
                networks.append(("mlp.shared_experts.", (), c.expert_hidden * c.shared_experts))
        for name, stack, hidden in networks:
            block |= {f"{name}{part}_proj.weight": (*stack, hidden, d) for part in ("gate", "up")}
            block[f"{name}down_proj.weight"] = (*stack, d, hidden)
        if layer >= c.layers:
            block["shared_head.norm.weight"] = (d,)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        if layer == c.layers - 1:
            shapes |= {"model.norm.weight": (d,)} | ({} if c.tied else {c.head: (c.vocabulary, d)})
    return shapes


def is_buffer(name: str) -> bool:
    """True for the gate's selection bias, which `bias_update` moves and no gradient does."""
    return name.endswith(BIAS)


def init_parameters(
    config: ModelConfig, *, seed: int = 0, std: float = 0.006, dtype: Any = "float32"
) -> dict[str, Array]:
    """Random NumPy parameters: normal with ``std`` (0.006, V3 section 4.2), norms 1, gate biases
    0."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return {
        name: (
            np.ones(shape)
            if "norm.weight" in name
            else np.zeros(shape)
            if is_buffer(name)
            else rng.normal(0, std, shape)
        ).astype(dtype)
        for name, shape in parameter_shapes(config).items()
    }


class Route(NamedTuple):
    """The choices of one MoE layer, which replay as constants."""

    indices: Array  # [B, T, K]: the routed experts
    counted: Array  # [B, T, K]: what the balance loss counts


class ModelOutput(NamedTuple):
    hidden: Array  # [B, T, D], after the final norm: what the head and `log_prob` read
    loss: Array | None  # scalar main + λ/depth Σ mtp + Σ balance; None without loss
    main: Array | None  # scalar
    mtp: list[Array]  # scalar of each module, before λ
    balance: dict[int, Array]  # scalar of each MoE layer, with its α
    routes: dict[int, Route]  # by layer, MTP modules included
    loads: dict[
        int, Array
    ]  # [E] of each MoE layer: tokens that chose each expert, padding left out


class BlockSaved(NamedTuple):
    attention_norm: Any
    mla: Any
    ffn_norm: Any
    ffn: Any  # dense FFN, or None
    router: Any  # MoE, or None
    balance: Any
    moe: Any


class MTPModuleSaved(NamedTuple):
    embedding: Any
    keep: Array | None  # [B, T−k, 1]: 0 where the convention zeroes the embedding
    mtp: Any
    block: BlockSaved
    norm: Any
    head: Any


class ModelSaved(NamedTuple):
    run: Run
    embedding: Any
    blocks: list[BlockSaved]
    norm: Any
    hidden: Array  # [B, T, D]: the head's input, for dlogits
    head: Any  # None without loss
    mtp: list[MTPModuleSaved]


class Run(NamedTuple):
    """What every block of one forward shares; the three dicts collect, by MoE layer, what
    `ModelOutput` reports."""

    params: Parameters
    config: ModelConfig
    ops: Ops
    routes: Mapping[int, Route]
    with_loss: bool
    balance: dict[int, Array]
    chosen: dict[int, Route]
    loads: dict[int, Array]
    caches: dict[int, Array] | None = (
        None  # by layer [B, S − T, C + R]; each block replaces its own by [B, S, C + R]
    )

    def names(self, layer: int, *names: str) -> list[Array | None]:
        return [self.params.get(f"model.layers.{layer}.{name}.weight") for name in names]


class Batch(NamedTuple):
    """What a depth reads and predicts, each [B, its positions]: the main model is depth 0, MTP
    module k depth k.

    With caches, ``takes_part`` is [B, S]: the cached positions, then these.
    """

    tokens: Array
    targets: Array
    mask: Array  # which targets count
    positions: Array  # for RoPE
    takes_part: (
        Array | None
    )  # False for padding (and, in MTP, where a position joins a token of another document)
    segments: Array | None

    def at(self, depth: int) -> Batch:
        """The batch as MTP module ``depth`` meets it."""
        pairs = mtp_pairs(
            self.tokens, self.targets, self.mask, depth, self.segments, self.takes_part
        )
        cut = self.tokens.shape[1] - depth
        segments = None if self.segments is None else self.segments[:, :cut]
        return Batch(*pairs[:3], self.positions[:, :cut], pairs[3], segments)

    def mtp_normaliser(self, convention: str) -> float | None:
        """What the sum of an MTP loss is divided by (of the main batch); None: by the module's own
        targets."""
        if convention == "positions":
            return float(self.tokens.size) if self.takes_part is None else _count(self.takes_part)
        return _count(self.mask) if convention == "main" else None


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
    ops: Ops = REFERENCE,
    with_loss: bool = True,
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
            document.
        key_mask: [B, T] bool, False for padding, which nobody sees and no loss or load counts.
        segments: [B, T] integers, the document of each position; attention stays within one, and an
            MTP module leaves out the positions whose later token lies in another.
        positions: [B, T] or [T] for RoPE, default 0 … T − 1.
        routes: by layer, choices to replay instead of selecting experts.
        ops: the table of implementations.

    Returns (ModelOutput, saved). ValueError names every tensor that is missing or misshapen.
    """
    check_parameters(params, config)
    batch = make_batch(
        params, tokens, config, targets, mask, key_mask, segments, positions, with_loss
    )
    run = Run(params, config, ops, routes or {}, with_loss, {}, {}, {})
    x, embedding_saved = ops["embedding"].forward(
        params["model.embed_tokens.weight"], ids=batch.tokens
    )
    blocks = []
    for layer in range(config.layers):
        x, saved = block_forward(run, layer, x, batch)
        blocks.append(saved)
    hidden, norm_saved = ops["rms_norm"].forward(
        x, params["model.norm.weight"], eps=config.norm_eps
    )
    if not with_loss:
        output = ModelOutput(hidden, None, None, [], {}, run.chosen, run.loads)
        return output, ModelSaved(run, embedding_saved, blocks, norm_saved, hidden, None, [])
    main, head_saved = _head_forward(run, hidden, batch, None)
    loss, state = main, hidden if config.conventions.mtp_hidden == "normed" else x
    normaliser = batch.mtp_normaliser(config.conventions.mtp_normaliser)
    mtp_losses: list[Array] = []
    modules: list[MTPModuleSaved] = []
    for depth in range(1, config.mtp_depth + 1):
        later = batch.at(depth)
        state, normed, module = mtp_module_forward(
            run, depth, state[:, : later.tokens.shape[1], :], later
        )
        mtp_loss, module_head_saved = _head_forward(run, normed, later, normaliser)
        modules.append(module._replace(head=module_head_saved))
        mtp_losses.append(mtp_loss)
        loss = loss + config.mtp_weight / config.mtp_depth * mtp_loss  # (mtp.5)
    loss = sum(run.balance.values(), start=loss)
    output = ModelOutput(hidden, loss, main, mtp_losses, run.balance, run.chosen, run.loads)
    return output, ModelSaved(run, embedding_saved, blocks, norm_saved, hidden, head_saved, modules)


def logits(params: Parameters, hidden: Array, ops: Ops = REFERENCE) -> Array:
    """The next-token logits [B, T, W] of ``ModelOutput.hidden``."""
    head = "lm_head.weight" if "lm_head.weight" in params else "model.embed_tokens.weight"  # tied
    return ops["linear"].forward(hidden, params[head])[0]


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
    run, config, ops, params = saved.run, saved.run.config, saved.run.ops, saved.run.params
    if dloss is None and dlogits is None and dhidden is None:
        dloss = 1.0
    if dloss is not None and saved.head is None:
        raise ValueError("dloss needs a forward with with_loss=True, got one without a loss")
    grads = Gradients(params)
    hidden, head = saved.hidden, params[config.head]
    dx = dh = zeros(hidden.shape, hidden)
    if dhidden is not None:
        expect("dhidden", dhidden, "(B, T, D)", tuple(hidden.shape))
        dh = dh + number(dhidden, hidden)
    if dlogits is not None:
        expect("dlogits", dlogits, "(B, T, W)", (*hidden.shape[:2], config.vocabulary))
        _, linear_saved = ops["linear"].forward(hidden, head)
        dh_logits, dw = ops["linear"].backward(number(dlogits, hidden), linear_saved)
        dh = dh + dh_logits
        grads.add(config.head, dw)
    if dloss is not None:
        dh_head, dw = ops["head_cross_entropy"].backward(dloss, saved.head)
        dh = dh + dh_head
        grads.add(config.head, dw)
        dstate = None
        for depth in range(config.mtp_depth, 0, -1):
            dstate = mtp_module_backward(run, depth, dloss, dstate, saved.mtp[depth - 1], grads)
        if dstate is not None and config.conventions.mtp_hidden == "normed":
            dh = dh + dstate
        elif dstate is not None:
            dx = dx + dstate
    dx_norm, dw = ops["rms_norm"].backward(dh, saved.norm)
    dx = dx + dx_norm
    grads.add("model.norm.weight", dw)
    for layer in range(config.layers - 1, -1, -1):
        dx = block_backward(run, layer, dx, dloss, saved.blocks[layer], grads)
    grads.add("model.embed_tokens.weight", ops["embedding"].backward(dx, saved.embedding))
    return grads.complete()


class Gradients:
    """Sums of gradients by parameter name: a tensor with two users gets two contributions."""

    def __init__(self, params: Parameters) -> None:
        self.params = params
        self.sums: dict[str, Array] = {}

    def add(self, name: str, gradient: Array | None) -> None:
        if gradient is not None:
            self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient

    def add_layer(self, layer: int, gradients: Mapping[str, Array | None]) -> None:
        for name, gradient in gradients.items():
            self.add(f"model.layers.{layer}.{name}.weight", gradient)

    def complete(self) -> dict[str, Array]:
        """In the order of the parameters; a parameter that took no part gets zeros."""
        return {
            name: self.sums[name] if name in self.sums else zeros(p.shape, p)
            for name, p in self.params.items()
            if not is_buffer(name)
        }


def block_forward(run: Run, layer: int, x: Array, batch: Batch) -> tuple[Array, BlockSaved]:
    """x + MLA(norm(x)), then x + FFN or MoE(norm(x)); adds the layer's balance loss, route and load
    to ``run``."""
    config, ops = run.config, run.ops
    yarn, conventions = config.active_yarn, config.conventions
    norm, q, q_a, q_a_norm, q_b, kv_a, kv_a_norm, kv_b, o, ffn_norm, gate = run.names(
        layer, *NORM_AND_MLA, *FFN_NORM
    )
    past = None if run.caches is None else run.caches.get(layer)
    h, attention_norm = ops["rms_norm"].forward(x, norm, eps=config.norm_eps)
    (y, cache), mla = ops["mla"].forward(
        h,
        past,
        q_a,
        q_a_norm,
        q if q_b is None else q_b,
        kv_a,
        kv_a_norm,
        kv_b,
        o,
        heads=config.heads,
        scale=(config.nope + config.rope) ** -0.5 * yarn_softmax_factor(yarn),
        eps=config.latent_eps,
        positions=batch.positions,
        layout=conventions.rope_layout,
        inv_freq=namespace(x=x).asarray(rope_frequencies(config.rope, config.theta, yarn)),
        factor=config.rope_factor,
        key_mask=batch.takes_part,
        segments=batch.segments,
        ops=ops,
    )
    if run.caches is not None:
        run.caches[layer] = cache
    x = x + y
    h, ffn_norm_saved = ops["rms_norm"].forward(x, ffn_norm, eps=config.norm_eps)
    if layer < config.dense_layers:
        y, ffn = ops["ffn"].forward(h, *run.names(layer, *DENSE), ops=ops)
        return x + y, BlockSaved(attention_norm, mla, ffn_norm_saved, ffn, None, None, None)
    replay, (normalise, scale) = run.routes.get(layer), config.weight_rule
    routed, router = ops["router"].forward(
        h,
        gate,
        top_k=config.top_k,
        bias=run.params.get(f"model.layers.{layer}.{BIAS}"),
        groups=config.groups,
        keep_groups=config.keep_groups,
        group_score=config.group_score,
        score=config.gate,
        normalise=normalise,
        scale=scale,
        epsilon=conventions.gate_epsilon,
        masked_groups=conventions.masked_groups,
        routes=replay and replay.indices,
    )
    counted = routed.indices if conventions.balance_counts == "routed" else None
    if replay is not None:
        counted = replay.counted
    elif counted is None:
        counted = select_experts(real(routed.scores), config.top_k)
    run.chosen[layer] = Route(routed.indices, counted)
    takes_part = None if batch.takes_part is None else batch.takes_part[:, -x.shape[1] :]
    run.loads[layer] = expert_load(routed.indices, config.experts, takes_part)
    balance_saved = None
    if run.with_loss:
        run.balance[layer], balance_saved = ops["balance_loss"].forward(
            routed.scores,
            alpha=config.balance_weight,
            top_k=config.top_k,
            counted=counted,
            mask=batch.takes_part,
        )
    y, moe = ops["moe"].forward(
        h, routed.weights, *run.names(layer, *EXPERTS, *SHARED), indices=routed.indices, ops=ops
    )
    return x + y, BlockSaved(attention_norm, mla, ffn_norm_saved, None, router, balance_saved, moe)


def block_backward(
    run: Run, layer: int, dx: Array, dloss: Array | None, saved: BlockSaved, grads: Gradients
) -> Array:
    """The gradient of the block's input from that of its output; adds those of its parameters to
    ``grads``."""
    ops, add = run.ops, grads.add_layer
    if saved.ffn is not None:
        dh, *dw = ops["ffn"].backward(dx, saved.ffn)
        add(layer, dict(zip(DENSE, dw, strict=True)))
    else:
        dh, dweights, *dw = ops["moe"].backward(dx, saved.moe)
        add(layer, dict(zip(EXPERTS + SHARED, dw, strict=True)))
        dscores = None if dloss is None else ops["balance_loss"].backward(dloss, saved.balance)
        dh_gate, dw_gate = ops["router"].backward((dweights, dscores), saved.router)
        add(layer, {"mlp.gate": dw_gate})
        dh = dh + dh_gate
    dx_ffn, dw_norm = ops["rms_norm"].backward(dh, saved.ffn_norm)
    add(layer, {"post_attention_layernorm": dw_norm})
    dx = dx + dx_ffn
    dh, _, dq_a, dq_a_norm, dq_b, *dw = ops["mla"].backward((dx, None), saved.mla)
    if run.config.q_latent is None:
        add(layer, {"self_attn.q_proj": dq_b})
    else:
        add(
            layer,
            {
                "self_attn.q_a_proj": dq_a,
                "self_attn.q_a_layernorm": dq_a_norm,
                "self_attn.q_b_proj": dq_b,
            },
        )
    add(layer, dict(zip(NORM_AND_MLA[5:], dw, strict=True)))
    dx_attention, dw_norm = ops["rms_norm"].backward(dh, saved.attention_norm)
    add(layer, {"input_layernorm": dw_norm})
    return dx + dx_attention


def mtp_module_forward(
    run: Run, depth: int, state: Array, batch: Batch
) -> tuple[Array, Array, MTPModuleSaved]:
    """Module ``depth``: what it hands to the next, its normed output (the head's input), and
    saved."""
    config, ops, layer = run.config, run.ops, run.config.layers + depth - 1
    xp, embed = namespace(state=state), run.params["model.embed_tokens.weight"]
    hnorm, enorm, proj, norm = run.names(layer, *MTP)
    embedding, embedding_saved = ops["embedding"].forward(embed, ids=batch.tokens)
    keep = None
    if config.conventions.mtp_zero_first_embedding:
        keep = xp.astype(batch.positions[..., None] != 0, real(state).dtype)
        embedding = embedding * keep
    x, mtp = ops["mtp"].forward(
        state,
        embedding,
        hnorm,
        enorm,
        proj,
        eps=config.norm_eps,
        order=config.conventions.mtp_order,
        ops=ops,
    )
    x, block = block_forward(run, layer, x, batch)
    normed, norm_saved = ops["rms_norm"].forward(x, norm, eps=config.norm_eps)
    state = x if config.conventions.mtp_hidden == "raw" else normed
    return state, normed, MTPModuleSaved(embedding_saved, keep, mtp, block, norm_saved, None)


def mtp_module_backward(
    run: Run,
    depth: int,
    dloss: Array,
    dstate: Array | None,
    saved: MTPModuleSaved,
    grads: Gradients,
) -> Array:
    """The gradient of what module ``depth`` read of the previous depth, from that of what it handed
    to the next."""
    config, ops, layer = run.config, run.ops, run.config.layers + depth - 1
    dmtp = dloss * (config.mtp_weight / config.mtp_depth)  # (mtp.6)
    dnormed, dw_head = ops["head_cross_entropy"].backward(dmtp, saved.head)
    grads.add(config.head, dw_head)
    handed_on_raw = config.conventions.mtp_hidden == "raw"
    if dstate is not None and not handed_on_raw:
        dnormed = dnormed + dstate
    dx, dw_norm = ops["rms_norm"].backward(dnormed, saved.norm)
    if dstate is not None and handed_on_raw:
        dx = dx + dstate
    dx = block_backward(run, layer, dx, dloss, saved.block, grads)
    dread, dembedding, *dw = ops["mtp"].backward(dx, saved.mtp)
    grads.add_layer(layer, dict(zip(MTP, (*dw, dw_norm), strict=True)))
    if saved.keep is not None:
        dembedding = dembedding * saved.keep
    grads.add("model.embed_tokens.weight", ops["embedding"].backward(dembedding, saved.embedding))
    last = zeros(
        (dread.shape[0], 1, dread.shape[2]), dread
    )  # the position that this depth did not read
    return namespace(dread=dread).concat((dread, last), axis=1)


def make_batch(
    params: Parameters,
    tokens: Array,
    config: ModelConfig,
    targets: Array | None,
    mask: Array | None,
    key_mask: Array | None,
    segments: Array | None,
    positions: Array | None,
    with_loss: bool,
) -> Batch:
    """The main model's batch, with the defaults that `forward` promises."""
    embed = params["model.embed_tokens.weight"]
    xp, device = namespace(params=embed), embed.device
    expect("tokens", tokens, "(B, T)", (None, None))
    if tokens.shape[1] <= (config.mtp_depth if with_loss else 0):
        raise ValueError(
            f"tokens must have shape (B, T) with T > mtp_depth={config.mtp_depth}, got "
            f"{tokens.shape}"
        )
    tokens, (b, t) = expect_ids("tokens", tokens, config.vocabulary), tokens.shape
    for name, given in (("targets", targets), ("segments", segments)):
        if given is not None:
            expect(name, given, "(B, T)", (b, t))
    for name, given in (("mask", mask), ("key_mask", key_mask)):
        if given is not None:
            expect_mask(name, given, "(B, T)", (b, t))
    counts = (
        xp.ones((b, t), dtype=xp.bool, device=device)
        if key_mask is None
        else xp.asarray(key_mask, copy=True)
    )
    if targets is None:
        counts[:, -1] = False
        if key_mask is not None:
            counts[:, :-1] &= key_mask[:, 1:]
        if segments is not None:
            counts[:, :-1] &= segments[:, 1:] == segments[:, :-1]
        targets = xp.concat((tokens[:, 1:], tokens[:, -1:]), axis=1)
        mask = counts if mask is None else counts & mask
    elif mask is None:
        mask = counts
    if positions is None:
        positions = xp.arange(t, device=device)
    elif positions.shape != (t,):
        expect("positions", positions, "(B, T) or (T,)", (b, t))
    return Batch(tokens, targets, mask, xp.broadcast_to(positions, (b, t)), key_mask, segments)


def _count(mask: Array) -> float | None:
    """How many are True; None if none is, since a sum over none is 0 whatever divides it."""
    return float(library(mask).count_nonzero(mask)) or None


def _head_forward(
    run: Run, hidden: Array, batch: Batch, normaliser: float | None
) -> tuple[Array, Any]:
    """The cross-entropy of one depth."""
    head = run.params[run.config.head]
    return run.ops["head_cross_entropy"].forward(  # type: ignore[no-any-return]
        hidden, head, targets=batch.targets, mask=batch.mask, normaliser=normaliser, ops=run.ops
    )


def misfits(params: Parameters, config: ModelConfig) -> list[str]:
    """What is missing, misshapen, or no parameter of the config."""
    wanted = parameter_shapes(config)
    wrong = [f"{name} is missing" for name in wanted if name not in params]
    wrong += [
        f"{name} must have shape {shape}, got {tuple(params[name].shape)}"
        for name, shape in wanted.items()
        if name in params and tuple(params[name].shape) != shape
    ]
    return wrong + [
        f"{name} is not a parameter of this config" for name in params if name not in wanted
    ]


def check_parameters(params: Parameters, config: ModelConfig) -> None:
    wanted, wrong = parameter_shapes(config), misfits(params, config)
    dtype = getattr(params.get("model.embed_tokens.weight"), "dtype", None)
    wrong += [
        f"{name} must be {dtype} like model.embed_tokens.weight, got {params[name].dtype}"
        for name in wanted
        if name in params and not is_buffer(name) and params[name].dtype != dtype
    ]
    if wrong:
        raise ValueError("params do not fit the config: " + "; ".join(wrong))


NORM_AND_MLA = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_a_layernorm",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
)
FFN_NORM = ("post_attention_layernorm", "mlp.gate")
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
SHARED = (
    "mlp.shared_experts.gate_proj",
    "mlp.shared_experts.up_proj",
    "mlp.shared_experts.down_proj",
)
MTP = ("hnorm", "enorm", "eh_proj", "shared_head.norm")
