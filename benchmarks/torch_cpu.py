"""Torch's columns of `refimpl bench --cpu`: the same problems from the same numbers. Not part of
the package.

Loaded by its path from refimpl/bench/cpu/worker.py. `torch` is what someone who is after speed
writes with torch's own functions; values are padded to the width of queries and keys, without which
SDPA keeps all scores; `hf-…` is transformers' DeepseekV3, its attention padded likewise, with each
implementation of its experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from refimpl.bench.cpu.ours import STEPS, Work, expect_memory

VERSION = torch.__version__
Call = Callable[[], Any]
Arrays = dict[str, np.ndarray]

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def rms_norm(x: Any, w: Any, *, eps: float) -> Any:
    return functional.rms_norm(x, (x.shape[-1],), w, eps)


def rope(x: Any, *, positions: Any, inv_freq: Any) -> Any:
    """Interleaved pairs; x [B, T, H, R]."""
    turned = positions[:, None] * inv_freq
    cos, sin = (f(turned).to(x.dtype)[None, :, None, :] for f in (torch.cos, torch.sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def swiglu(gate: Any, up: Any) -> Any:
    return functional.silu(gate) * up


def linear(x: Any, w: Any) -> Any:
    return functional.linear(x, w)


def embedding(w: Any, *, ids: Any) -> Any:
    return functional.embedding(ids, w)


def router(x: Any, w: Any, *, top_k: int) -> Any:
    scores = functional.linear(x, w).sigmoid()
    chosen = scores.gather(-1, scores.topk(top_k, dim=-1).indices)
    return chosen / chosen.sum(-1, keepdim=True)


def attention(q: Any, k: Any, v: Any, *, scale: float) -> Any:
    """[B, T, H, …]; causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return padded(q, k, v, None, scale).transpose(1, 2)


def padded(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    """SDPA of heads [B, H, T, …], values padded to the width of the keys; causal without a mask."""
    wide = functional.pad(v, (0, k.shape[-1] - v.shape[-1]))
    y = functional.scaled_dot_product_attention(
        q, k, wide, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return y[..., : v.shape[-1]]


def mla(
    x: Any,
    w_q_a: Any,
    w_q_a_norm: Any,
    w_q_b: Any,
    w_kv_a: Any,
    w_kv_a_norm: Any,
    w_kv_b: Any,
    w_o: Any,
    *,
    heads: int,
    scale: float,
    eps: float,
    **angles: Any,
) -> Any:
    latent, rotated = w_kv_a_norm.shape[0], w_kv_a.shape[0] - w_kv_a_norm.shape[0]
    q = linear(rms_norm(linear(x, w_q_a), w_q_a_norm, eps=eps), w_q_b).unflatten(-1, (heads, -1))
    nope = q.shape[-1] - rotated
    compressed, k_pe = linear(x, w_kv_a).split((latent, rotated), dim=-1)
    kv = linear(rms_norm(compressed, w_kv_a_norm, eps=eps), w_kv_b).unflatten(-1, (heads, -1))
    k_pe = rope(k_pe[:, :, None, :], **angles).expand(-1, -1, heads, -1)
    q = torch.cat((q[..., :nope], rope(q[..., nope:], **angles)), dim=-1)
    k = torch.cat((kv[..., :nope], k_pe), dim=-1)
    return linear(attention(q, k, kv[..., nope:], scale=scale).flatten(-2), w_o)


def block(x: Any, w_norm: Any, w_gate: Any, w_up: Any, w_down: Any, *, eps: float) -> Any:
    h = rms_norm(x, w_norm, eps=eps)
    return linear(swiglu(linear(h, w_gate), linear(h, w_up)), w_down)


def cross_entropy(logits: Any, *, targets: Any) -> Any:
    return functional.cross_entropy(logits, targets)


def head_cross_entropy(h: Any, w: Any, *, targets: Any) -> Any:
    return functional.cross_entropy(functional.linear(h, w), targets)


FUNCTIONS = {
    f.__name__: f
    for f in (
        rms_norm,
        rope,
        swiglu,
        linear,
        embedding,
        router,
        attention,
        mla,
        block,
        cross_entropy,
        head_cross_entropy,
    )
}


def work_of(column: str, problem: str, inputs: Any, sizes: Any) -> Work:
    compiled = column.endswith("-compile")
    if compiled:
        torch._dynamo.reset()
    if problem == "step":
        return step(experts_of(column), inputs, sizes, compiled)
    if problem == "adamw":
        return adamw(inputs)
    if problem == "moe":
        return moe(experts_of(column), inputs, sizes, compiled)
    return differentiated(FUNCTIONS[problem], inputs, compiled)


def differentiated(function: Callable[..., Any], inputs: Any, compiled: bool) -> Work:
    tensors = {n: tensor(x).requires_grad_() for n, x in inputs.arrays.items() if x is not None}
    fixed = {name: tensor(x) for name, x in inputs.fixed.items()}
    dy = inputs.dy[0] if isinstance(inputs.dy, tuple) else inputs.dy
    dy = torch.tensor(dy) if isinstance(dy, float) else tensor(dy)
    run = torch.compile(function) if compiled else function

    def call() -> Any:
        y = run(*tensors.values(), **fixed)
        return y, torch.autograd.grad(y, list(tensors.values()), dy)

    def gradients() -> Arrays:
        return {n: g.numpy() for n, g in zip(tensors, call()[1], strict=True)}

    return Work(call, gradients)


def tensor(x: Any) -> Any:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def adamw(inputs: Any) -> Work:
    p = torch.from_numpy(inputs.arrays["p"]).requires_grad_()
    g = torch.from_numpy(inputs.dy)
    optimizer = fused_adamw([p], inputs.fixed["learning_rate"])
    p.grad = g

    def gradients() -> Arrays:
        for k in range(STEPS):
            p.grad = torch.roll(g, k)
            optimizer.step()
        p.grad = g
        return {"p": p.detach().numpy().copy()}

    return Work(optimizer.step, gradients)


def fused_adamw(parameters: Any, rate: float) -> Any:
    return torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )


# transformers


def experts_of(column: str) -> str:
    """The implementation of the experts that a column is named after."""
    return "grouped_mm" if column == "hf-compile" else column.removeprefix("hf-")


def their_config(experts: str, s: Any) -> Any:
    import transformers
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    transformers.utils.logging.set_verbosity_error()
    ALL_ATTENTION_FUNCTIONS.register("padded", their_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("padded", sdpa_mask)
    config = transformers.DeepseekV3Config(
        vocab_size=s.vocabulary,
        hidden_size=s.width,
        num_hidden_layers=s.layers,
        first_k_dense_replace=1,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        q_lora_rank=s.q_latent,
        kv_lora_rank=s.kv_latent,
        qk_nope_head_dim=s.nope,
        qk_rope_head_dim=s.rope,
        v_head_dim=s.value,
        intermediate_size=s.hidden,
        moe_intermediate_size=s.expert_hidden,
        n_routed_experts=s.experts,
        n_shared_experts=s.shared,
        num_experts_per_tok=s.top_k,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        max_position_embeddings=max(s.length, 1024),
        rope_scaling=None,
        use_cache=False,
    )
    config._attn_implementation = ATTENTION
    config._experts_implementation = experts
    return config


ATTENTION = "padded"


def their_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **given: Any
) -> Any:
    y = padded(query, key, value, attention_mask, given["scaling"])
    return y.transpose(1, 2).contiguous(), None


def expect_copies(experts: str, s: Any, layers: int) -> None:
    """CouldNotRun where batched_mm's copy of an expert's weights for every row would not fit."""
    if experts == "batched_mm":
        expect_memory(12 * s.tokens * s.top_k * s.expert_hidden * s.width * (layers + 1))


def moe(experts: str, inputs: Any, s: Any, compiled: bool) -> Work:
    """Their routed experts, and the shared ones, from given routes."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    expect_copies(experts, s, 1)
    config = their_config(experts, s)
    routed = theirs.DeepseekV3Experts(config)
    shared = theirs.DeepseekV3MLP(config, s.expert_hidden * s.shared) if s.shared else None
    given = {name: torch.from_numpy(a) for name, a in inputs.arrays.items() if a is not None}
    x, weights = given["x"].requires_grad_(), given["weights"].requires_grad_()
    routed.gate_up_proj.data = torch.cat((given["w_gate"], given["w_up"]), dim=1)
    routed.down_proj.data = given["w_down"]
    asked = [x, weights, routed.gate_up_proj, routed.down_proj]
    if shared is not None:
        parts = [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight]
        for part, name in zip(parts, ("gate", "up", "down"), strict=True):
            part.data = given[f"w_shared_{name}"]
        asked += parts
    indices, dy = torch.from_numpy(inputs.fixed["indices"]), torch.from_numpy(inputs.dy)

    def function() -> Any:
        y = routed(x, indices, weights)
        return y if shared is None else y + shared(x)

    run = torch.compile(function) if compiled else function

    def call() -> Any:
        y = run()
        return y, torch.autograd.grad(y, asked, dy)

    def gradients() -> Arrays:
        dx, dweights, dgate_up, ddown, *rest = (g.numpy() for g in call()[1])
        found = [dx, dweights, dgate_up[:, : s.expert_hidden], dgate_up[:, s.expert_hidden :]]
        return dict(zip(given, [*found, ddown, *rest], strict=True))

    return Work(call, gradients)


def step(experts: str, inputs: Any, s: Any, compiled: bool) -> Work:
    from transformers import DeepseekV3ForCausalLM

    expect_copies(experts, s, s.layers - 1)
    model = DeepseekV3ForCausalLM(their_config(experts, s)).float().train()
    model.load_state_dict(their_names(inputs.arrays))
    optimizer = fused_adamw(model.parameters(), inputs.fixed["learning_rate"])
    tokens = torch.from_numpy(inputs.fixed["tokens"])
    run = torch.compile(model) if compiled else model

    def call() -> None:
        run(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def gradients() -> Arrays:
        run(input_ids=tokens, labels=tokens).loss.backward()
        found = {name: p.grad.numpy() for name, p in model.named_parameters()}
        optimizer.step()  # which makes its moments: they are no memory of a call
        optimizer.zero_grad()
        return our_names(found, s.expert_hidden)

    return Work(call, gradients)


def their_names(arrays: Arrays) -> dict[str, Any]:
    """Of ours in files' names, with experts stacked, those in transformers' memory."""
    found = {}
    for name, array in arrays.items():
        if name.endswith("experts.gate_proj.weight") and array.ndim == 3:
            both = (array, arrays[name.replace("gate_proj", "up_proj")])
            found[name.replace("gate_proj.weight", "gate_up_proj")] = np.concatenate(both, axis=1)
        elif name.endswith("experts.down_proj.weight") and array.ndim == 3:
            found[name.removesuffix(".weight")] = array
        elif not (name.endswith("experts.up_proj.weight") and array.ndim == 3):
            found[name] = array
    return {name: torch.from_numpy(array) for name, array in found.items()}


def our_names(tensors: Arrays, hidden: int) -> Arrays:
    found = {}
    for name, array in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            found[name.replace("gate_up_proj", "gate_proj.weight")] = array[:, :hidden]
            found[name.replace("gate_up_proj", "up_proj.weight")] = array[:, hidden:]
        else:
            found[name + ".weight" * name.endswith("experts.down_proj")] = array
    return found
