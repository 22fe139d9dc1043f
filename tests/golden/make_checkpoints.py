"""Four tiny checkpoints that transformers saved, each with what transformers computes on it in
float64.

    python tests/golden/make_checkpoints.py [FOLDER]      (needs the extra oracle; by default
    tests/golden/checkpoints)

A checkpoint is config.json and model.safetensors (float32). Beside it, outputs.safetensors:
aux/tokens and aux/key_mask [B, T], out/logits and out/loss (the mean over the tokens that have a
next one), and grad/NAME of every parameter under our names, all by autograd with transformers'
casts to float32 patched (tests/oracle/hugging_face.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from golden.checkpoint_values import SMALLEST_GAP
from oracle.hugging_face import NarrowNumbers, Routing, build, float64, their_values

SHAPE: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 12, "intermediate_size": 11, "moe_intermediate_size": 5,
    "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 7,
    "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 5, "qk_nope_head_dim": 6,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "max_position_embeddings": 256, "pad_token_id": None,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # V3's parts, with unequal mscales and biases that are mostly negative
    "v3": (
        "v3",
        SHAPE
        | {
            "q_lora_rank": 5,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    # as Moonlight: no query compression, one group, norms with 1e-5, no YaRN
    "v3-moonlight": (
        "v3",
        SHAPE
        | {
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.446,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        },
    ),
    # as V2-Lite, but with a context no longer than the original one: transformers applies YaRN all
    # the same
    "v2-greedy": (
        "v2",
        SHAPE
        | {
            "topk_method": "greedy",
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "max_position_embeddings": 64,
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    # as V2, but with two settings of which transformers does not do what they say
    "v2-group-limited": (
        "v2",
        SHAPE
        | {
            "q_lora_rank": 5,
            "topk_method": "group_limited_greedy",
            "n_routed_experts": 12,
            "n_group": 3,
            "topk_group": 1,
            "moe_intermediate_size": 4,
            "n_shared_experts": 2,
            "routed_scaling_factor": 16.0,
            "norm_topk_prob": True,
            "rope_parameters": YARN | {"mscale": 0.707},
        },
    ),
}


def make(name: str, folder: Path) -> None:
    """Write the checkpoint called ``name`` to the folder, and its outputs."""
    family, settings = MODELS[name]
    seed = sorted(MODELS).index(name) + 1
    tokens = np.random.default_rng(seed).integers(0, settings["vocab_size"], (2, 12))
    key_mask = np.arange(12) < np.array([[12], [8]])
    with float64():
        model = build(family, settings, seed, folder)
        routing = Routing(model)
        with NarrowNumbers() as narrow:
            values = their_values(
                model, tokens, np.where(key_mask, tokens, -100), attention_mask=key_mask
            )
    if narrow.seen or routing.margin() < SMALLEST_GAP:
        raise SystemExit(
            f"{name}: float32 in {narrow.seen or 'nothing'}, closest choice {routing.margin():.1e}"
        )
    (folder / "generation_config.json").unlink()
    outputs = {
        "aux/tokens": tokens,
        "aux/key_mask": key_mask,
        "out/logits": values.logits,
        "out/loss": values.loss,
    }
    outputs |= {f"grad/{parameter}": gradient for parameter, gradient in values.grads.items()}
    arrays = {name: np.asarray(output, order="C") for name, output in outputs.items()}
    save_file(arrays, folder / "outputs.safetensors")
    for path in folder.iterdir():
        path.chmod(0o644)
    print(f"{name}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "checkpoints"
    for name in MODELS:
        make(name, root / name)
